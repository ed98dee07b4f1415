#pragma once

#ifdef _WIN32
#define VIM_EXPORT extern "C" __declspec(dllexport)
#else
#define VIM_EXPORT extern "C" __attribute__((visibility("default")))
#endif

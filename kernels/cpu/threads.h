// Threads for the kernels. See threads.cpp.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace vim {

using Task = void (*)(const void* context, int64_t item);

// Calls task(context, i) once for each i below items, on at most `threads` threads.
void parallel_for(int64_t threads, int64_t items, Task task, const void* context);

// Returns memory of the calling thread, 64-byte aligned and uninitialised; a later call takes it
// back.
float* scratch(size_t floats);

}  // namespace vim

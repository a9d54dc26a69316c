// Threads that share the tasks of a call. Stages follow each other; within a stage tasks are taken
// in order by whichever thread is free.
#pragma once
#include <cstddef>
#include <cstdint>

struct Stage {
    int64_t tasks;
    void (*run)(void *context, int64_t task);
    void *context;
};

// Returns when all tasks are done. `bytes` is what they read: a little is not worth other threads.
void run_stages(const Stage *stages, int count, int64_t bytes);

// A stage whose tasks are calls of something with task(number), which must outlive it.
template <class Task>
Stage stage_of(int64_t tasks, Task &task) {
    return {tasks, [](void *it, int64_t number) { (*static_cast<Task *>(it))(number); }, &task};
}

// One stage alone.
template <class Task>
void parallel(int64_t tasks, int64_t bytes, Task task) {
    const Stage stage = stage_of(tasks, task);
    run_stages(&stage, 1, bytes);
}

// Room of the calling thread, aligned to 64 bytes, kept from call to call.
uint8_t *kept_room(size_t bytes);

// GOMP_parallel of the OpenMP whose threads are to be used; null for threads of our own.
void use_threads_of(void *gomp_parallel);

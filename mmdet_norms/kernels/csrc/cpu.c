/* Compiled CPU kernels: plain C, called through ctypes with pointers into contiguous tensors. No Python, no torch. */

#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
/* One copy per instruction set, chosen when the library is loaded. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif

typedef int (*work)(void *job, int64_t begin, int64_t end);

typedef struct {
    work function;
    void *job;
    int64_t begin, end;
    int failed;
} share;

static void *run(void *argument) {
    share *part = argument;
    part->failed = part->function(part->job, part->begin, part->end);
    return NULL;
}

/* Split pieces of work between threads. Not OpenMP: torch brings its own copy of it, and two would fight for the cores. */
static int in_threads(work function, void *job, int64_t pieces, int threads) {
    if (threads > pieces) threads = pieces;
    if (threads <= 1) return function(job, 0, pieces);
    share *parts = malloc(threads * sizeof(share));
    pthread_t *handles = malloc(threads * sizeof(pthread_t));
    if (!parts || !handles) return free(parts), free(handles), 1;
    int failed = 0, started = 0;
    for (int t = 0; t < threads; t++)
        parts[t] = (share){function, job, pieces * t / threads, pieces * (t + 1) / threads, 0};
    for (int t = 1; t < threads; t++) {
        if (pthread_create(&handles[t], NULL, run, &parts[t])) break;
        started = t;
    }
    run(&parts[0]);
    for (int t = started + 1; t < threads; t++) run(&parts[t]); /* what no thread could be had for */
    for (int t = 1; t <= started; t++) pthread_join(handles[t], NULL);
    for (int t = 0; t < threads; t++) failed |= parts[t].failed;
    free(parts), free(handles);
    return failed;
}

#define REAL float
#define NAME(name) name##_f32
#include "bnet.h"
#undef REAL
#undef NAME
#define REAL double
#define NAME(name) name##_f64
#include "bnet.h"

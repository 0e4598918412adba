/* Compiled CPU kernels: plain C, called through ctypes with pointers into contiguous tensors. No Python, no torch. */

#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
/* One copy per instruction set, chosen when the library is loaded. */
#if defined(CLONES) /* by whoever compiles it otherwise */
#elif defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif

/* To be raised, here and in compiled.py, whenever structures or arguments change. */
EXPORT int mmdet_norms_interface(void) { return 3; }

typedef int (*work)(void *job, int64_t begin, int64_t end);

/* Starts `count` threads that all run function(data), like GOMP_parallel of OpenMP; NULL: there is none. */
typedef void (*team)(void (*function)(void *), void *data, unsigned count, unsigned flags);

typedef struct {
    work function;
    void *job;
    int64_t pieces, step, next;
    int failed;
} share;

/* Take pieces until none is left, so that a thread whose core is busy otherwise does less. */
static void take(void *argument) {
    share *all = argument;
    for (;;) {
        const int64_t begin = __atomic_fetch_add(&all->next, all->step, __ATOMIC_RELAXED);
        if (begin >= all->pieces) return;
        const int64_t end = begin + all->step < all->pieces ? begin + all->step : all->pieces;
        if (all->function(all->job, begin, end)) __atomic_store_n(&all->failed, 1, __ATOMIC_RELAXED);
    }
}

static void *take_in_thread(void *argument) {
    take(argument);
    return NULL;
}

/* Split pieces of work between threads: those of torch's own OpenMP, which wait busily for their next work after each of
 * torch's operators, so that others would have to share the cores with them; or else new ones. */
static int in_threads(work function, void *job, int64_t pieces, int threads, team openmp) {
    if (threads > pieces) threads = pieces;
    if (threads <= 1) return function(job, 0, pieces);
    share all = {function, job, pieces, (pieces + 4 * threads - 1) / (4 * threads), 0, 0};
    if (openmp) {
        openmp(take, &all, threads, 0);
        return all.failed;
    }
    pthread_t handles[64];
    int started = 0;
    while (started < threads - 1 && started < 64 && !pthread_create(handles + started, NULL, take_in_thread, &all))
        started++;
    take(&all);
    while (started) pthread_join(handles[--started], NULL);
    return all.failed;
}

enum { DONE = 0, NO_MEMORY = 1, REFUSED = 2 }; /* what a function returns */
enum { LARGEST_KERNEL = 4095 }; /* in compiled.py, too: LARGEST_KERNEL^2 values of 16 channels have 32 bit numbers */

/* product *= factor, unless that is no number; whether it is one. */
static int multiply(int64_t *product, int64_t factor) {
    return factor >= 0 && !__builtin_mul_overflow(*product, factor, product);
}

#define REAL float
#define NAME(name) name##_f32
#include "bnet.h"
#undef REAL
#undef NAME
#define REAL double
#define NAME(name) name##_f64
#include "bnet.h"

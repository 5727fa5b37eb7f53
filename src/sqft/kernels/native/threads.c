/* A small pool of threads. Why not OpenMP: torch brings one copy of it, llama.cpp another, and this library must
 * load beside both and depend on neither.
 *
 * Workers spin some 50 microseconds for the next product, as decoding brings one after the other, then sleep. Parts
 * are taken from one counter; the caller works too, and when nothing is left calls off
 * the workers that have not begun. One caller at a time has the workers; a second one works alone.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>

#include "layouts.h"

#define MOST 63
#define SPINS 2000

enum { IDLE, CALLED, WORKING };

static pthread_mutex_t caller = PTHREAD_MUTEX_INITIALIZER, lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER;
static atomic_int state[MOST]; /* of each worker */
static atomic_int asleep;
static int workers, watches_forks;
static void (*task)(void *context, int64_t part);
static void *task_context;
static int64_t num_parts;
static atomic_llong next_part;

static void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void take_parts(void) {
    int64_t part;
    while ((part = atomic_fetch_add(&next_part, 1)) < num_parts) task(task_context, part);
}

static void *work(void *argument) {
    atomic_int *mine = argument;
    for (;;) {
        int called = CALLED;
        for (int spins = 0; atomic_load(mine) != CALLED && spins < SPINS; spins++) relax();
        if (atomic_load(mine) != CALLED) {
            pthread_mutex_lock(&lock);
            atomic_fetch_add(&asleep, 1);
            while (atomic_load(mine) != CALLED) pthread_cond_wait(&wake, &lock);
            atomic_fetch_sub(&asleep, 1);
            pthread_mutex_unlock(&lock);
        }
        if (atomic_compare_exchange_strong(mine, &called, WORKING)) {
            take_parts();
            atomic_store(mine, IDLE);
        }
    }
    return 0;
}

/* A forked child has the memory of the pool, but none of its threads. */
static void forget_workers(void) {
    workers = 0;
    atomic_store(&asleep, 0);
    for (int i = 0; i < MOST; i++) atomic_store(&state[i], IDLE);
    pthread_mutex_init(&caller, 0);
    pthread_mutex_init(&lock, 0);
    pthread_cond_init(&wake, 0);
}

/* Have at least so many workers, or as many as there can be. */
static int hire(int wanted) {
    sigset_t all, before;
    if (wanted > MOST) wanted = MOST;
    if (!watches_forks) watches_forks = !pthread_atfork(0, 0, forget_workers);
    sigfillset(&all); /* signals are the program's own threads' */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (workers < wanted) {
        pthread_t thread;
        if (pthread_create(&thread, 0, work, &state[workers])) break;
        pthread_detach(thread);
        workers++;
    }
    pthread_sigmask(SIG_SETMASK, &before, 0);
    return workers < wanted ? workers : wanted;
}

void sqft_parallel(void (*what)(void *context, int64_t part), void *context, int64_t parts, int threads) {
    if (threads > parts) threads = (int)parts;
    if (threads < 2 || pthread_mutex_trylock(&caller)) {
        for (int64_t part = 0; part < parts; part++) what(context, part);
        return;
    }
    int helpers = hire(threads - 1);
    task = what;
    task_context = context;
    num_parts = parts;
    atomic_store(&next_part, 0);
    for (int i = 0; i < helpers; i++) atomic_store(&state[i], CALLED);
    if (atomic_load(&asleep)) {
        pthread_mutex_lock(&lock);
        pthread_cond_broadcast(&wake);
        pthread_mutex_unlock(&lock);
    }
    take_parts();
    for (int i = 0; i < helpers; i++) {
        int called = CALLED;
        if (atomic_compare_exchange_strong(&state[i], &called, IDLE)) continue;
        while (atomic_load(&state[i]) != IDLE) relax();
    }
    pthread_mutex_unlock(&caller);
}

/* Forks, processors, and how many threads can be had: what OpenMP does not say before it is too late. */

#ifndef RAU_THREADS_H
#define RAU_THREADS_H

#ifndef RAU_OPENMP
#ifdef _OPENMP
#define RAU_OPENMP 1
#else
#define RAU_OPENMP 0
#endif
#endif
#if RAU_OPENMP
#include <omp.h>
#endif

/* CPUs that this process may use. By the time that anybody asks, OMP_PROC_BIND may have bound the calling thread to one of them;
   the runtime counted before. 0 where there is none. */
static int rau_processors(void) {
#if RAU_OPENMP
    return omp_get_num_procs();
#else
    return 0;
#endif
}

static int rau_forked = 0;
#if !defined(_WIN32)
#include <ctype.h>
#include <pthread.h>
#include <stdlib.h>

/* libgomp's threads do not survive a fork, and waiting for them hangs: a forked child runs serially. */
static void rau_in_child(void) { rau_forked = 1; }
static void rau_watch_forks(void) { pthread_atfork(NULL, NULL, rau_in_child); }

/* Bytes of stack that libgomp asks for, as it reads them: a number of KiB, or with one of B, K, M, G behind. 0: the default. */
static size_t rau_stack_bytes(void) {
    const char *text = getenv("OMP_STACKSIZE");
    char *end;
    unsigned long number;
    if (text == NULL) text = getenv("GOMP_STACKSIZE");
    if (text == NULL) return 0;
    number = strtoul(text, &end, 10);
    while (isspace((unsigned char)*end)) end++;
    switch (tolower((unsigned char)*end)) {
    case 'b': return number;
    case 'm': return (size_t)number << 20;
    case 'g': return (size_t)number << 30;
    default: return (size_t)number << 10;
    }
}

static void *rau_wait(void *gate) {
    pthread_mutex_lock((pthread_mutex_t *)gate);
    pthread_mutex_unlock((pthread_mutex_t *)gate);
    return NULL;
}

/* How many of `wanted` threads can run together now, this one among them. Where a thread cannot be started (a limit on processes
   or on memory), libgomp ends the process, without an exception or a word to Python. So as many are started here first, and let
   go again, each time that a thread makes a larger team than its last one: what libgomp then starts, it starts a second time.
   What others start in the meantime can still take the place. */
static int rau_team(int wanted, size_t stack_bytes) {
#if RAU_OPENMP && defined(__GNUC__)
    static __thread int last = 1; /* libgomp keeps the threads of a team until a smaller one runs */
    pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;
    pthread_attr_t attributes;
    pthread_t *threads;
    int started = 0, i;
    if (wanted > last && (threads = malloc(wanted * sizeof(pthread_t))) == NULL) wanted = last;
    if (wanted > last) {
        pthread_attr_init(&attributes);
        if (stack_bytes) pthread_attr_setstacksize(&attributes, stack_bytes);
        pthread_mutex_lock(&gate);
        while (started < wanted - last && !pthread_create(&threads[started], &attributes, rau_wait, &gate)) started++;
        pthread_mutex_unlock(&gate);
        for (i = 0; i < started; i++) pthread_join(threads[i], NULL);
        pthread_attr_destroy(&attributes);
        free(threads);
        wanted = last + started;
    }
    last = wanted;
#endif
    (void)stack_bytes;
    return wanted;
}
#else
static void rau_watch_forks(void) {}
static size_t rau_stack_bytes(void) { return 0; }
static int rau_team(int wanted, size_t stack_bytes) {
    (void)stack_bytes;
    return wanted;
}
#endif

#endif

/* A clock that is an hour off, for what is started with LD_PRELOAD: only what tells the time of day.
   cc -shared -fPIC -fno-builtin -nostdlib -o clock.so clock_off.c */
struct moment { long seconds, fraction; };
extern long syscall(long, ...);
extern int sem_clockwait(void *, int, const struct moment *);
#ifdef __aarch64__
#define CLOCK_GETTIME 113
#else
#define CLOCK_GETTIME 228
#endif
#define OFF 3600
int clock_gettime(int clock, struct moment *now) {
    int failed = syscall(CLOCK_GETTIME, (long)clock, now);
    if (!failed && (clock == 0 || clock == 5)) now->seconds += OFF;
    return failed;
}
int gettimeofday(struct moment *now, void *zone) {
    int failed = clock_gettime(0, now);
    now->fraction /= 1000;
    return failed;
}
long time(long *where) {
    struct moment now;
    clock_gettime(0, &now);
    if (where) *where = now.seconds;
    return now.seconds;
}
int sem_timedwait(void *semaphore, const struct moment *until) {
    struct moment real = *until;
    real.seconds -= OFF;
    return sem_clockwait(semaphore, 0, &real);
}

/* Whatever changes or secures a file, of Python and of DuckDB alike, can be made to fail here.

   Built as a shared object and named in LD_PRELOAD. `faults_arm(n, kind)` arms the n-th such call from
   then on: kind 'k' kills the process before the call; 'f' lets that call and every later one find the
   disk full; 'e' lets that call alone find an input/output error. `faults_count()` tells how many there
   were since. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static atomic_long count, armed;
static char kind;

void faults_arm(long n, char how) {
    kind = how;
    count = 0;
    armed = n;
}

long faults_count(void) { return count; }

/* Whether this call fails; `room` says whether it is one that a full disk stops. */
static int fails(int room) {
    long now = ++count;
    if (!armed || now < armed) return 0;
    if (kind == 'k' && now == armed) kill(getpid(), SIGKILL);
    if (kind == 'e' && now == armed) {
        errno = EIO;
        return 1;
    }
    if (kind == 'f' && room) {
        errno = ENOSPC;
        return 1;
    }
    return 0;
}

/* Whether it is a file, and not the pipe through which promises are made. */
static int on_disk(int fd) {
    struct stat status;
    return fstat(fd, &status) == 0 && S_ISREG(status.st_mode);
}

#define WATCH_IF(condition, type, name, room, parameters, arguments)   \
    type name parameters {                                             \
        static type(*real) parameters;                                 \
        if (!real) real = (type(*) parameters)dlsym(RTLD_NEXT, #name); \
        return (condition) && fails(room) ? (type)-1 : real arguments; \
    }
#define WATCH(...) WATCH_IF(1, __VA_ARGS__)

WATCH(int, fsync, 0, (int fd), (fd))
WATCH(int, fdatasync, 0, (int fd), (fd))
WATCH(ssize_t, pwrite, 1, (int fd, const void *data, size_t size, off_t at), (fd, data, size, at))
WATCH(ssize_t, pwrite64, 1, (int fd, const void *data, size_t size, off64_t at), (fd, data, size, at))
WATCH(int, ftruncate, 0, (int fd, off_t size), (fd, size))
WATCH(int, ftruncate64, 0, (int fd, off64_t size), (fd, size))
WATCH(int, rename, 0, (const char *from, const char *to), (from, to))
WATCH(int, link, 1, (const char *from, const char *to), (from, to))
WATCH(int, linkat, 1, (int a, const char *from, int b, const char *to, int flags), (a, from, b, to, flags))
WATCH(int, unlink, 0, (const char *path), (path))
WATCH(int, remove, 0, (const char *path), (path))
WATCH(int, rmdir, 0, (const char *path), (path))
WATCH(int, mkdir, 1, (const char *path, mode_t mode), (path, mode))
WATCH(int, chmod, 0, (const char *path, mode_t mode), (path, mode))
WATCH(int, fchmodat, 0, (int at, const char *path, mode_t mode, int flags), (at, path, mode, flags))
WATCH_IF(on_disk(fd), ssize_t, write, 1, (int fd, const void *data, size_t size), (fd, data, size))
WATCH(ssize_t, copy_file_range, 1, (int from, off64_t *a, int to, off64_t *b, size_t size, unsigned flags),
      (from, a, to, b, size, flags))

/* Kills the process at its K-th call that changes a folder's files. LD_PRELOAD it, and call kill_arm.

   Seen are calls of libc by name: those of Python, of compiled loops and of C++ and Rust libraries. Not seen are changes
   through mapped memory, system calls made by instruction, and those that libc makes for itself (buffers of FILE). */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { NEVER, BEFORE, AFTER, HALF, INTERRUPT };

static atomic_int armed;
static atomic_long seen;
static long wanted;
static int mode, log_fd = -1;
static char root[PATH_MAX], named[PATH_MAX];

/* From now on calls count; the `at`-th kills, or interrupts, or before it the first whose path holds `part`. `log` gets a line for
   each call: its name and path. */
void kill_arm(const char *folder, long at, int when, const char *part, int log) {
    snprintf(root, sizeof root, "%s/", folder);
    snprintf(named, sizeof named, "%s", part);
    wanted = at, mode = when, log_fd = log;
    atomic_store(&seen, 0);
    atomic_store(&armed, 1);
}

static void die(void) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

/* Count a call; whether it is the one after, or amid, which the process dies. */
static int due(const char *name, const char *path) {
    char line[2 * PATH_MAX];
    int length = snprintf(line, sizeof line, "%s %s\n", name, path + strlen(root));
    if (log_fd >= 0) syscall(SYS_write, log_fd, line, length);
    if (named[0] && strstr(path, named)) die();
    if (atomic_fetch_add(&seen, 1) + 1 != wanted || mode == NEVER) return 0;
    if (mode == BEFORE) die();
    if (mode == INTERRUPT) return kill(getpid(), SIGINT), 0;
    return 1;
}

static int inside(const char *path) { return strncmp(path, root, strlen(root)) == 0; }

static int of_fd(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return inside(path);
}

static int of_path(int folder, const char *given, char *path) {
    char from[PATH_MAX];
    if (!given) return 0;
    if (given[0] == '/') {
        snprintf(path, PATH_MAX, "%s", given);
    } else if (folder == AT_FDCWD) {
        if (!getcwd(from, sizeof from)) return 0;
        snprintf(path, 2 * PATH_MAX, "%s/%s", from, given);
    } else {
        of_fd(folder, from);
        snprintf(path, 2 * PATH_MAX, "%s/%s", from, given);
    }
    return inside(path);
}

#define REAL(type, name, ...)                                       \
    static type (*real)(__VA_ARGS__);                               \
    if (!real) real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name); \
    char path[2 * PATH_MAX]

/* A function whose call changes what `test` finds a path for. */
#define CALL(type, name, parameters, types, arguments, test) \
    type name parameters {                                   \
        REAL(type, #name, types);                            \
        int last = atomic_load(&armed) && (test) && due(#name, path); \
        type result = real arguments;                        \
        if (last) die();                                     \
        return result;                                       \
    }
#define TYPES(...) __VA_ARGS__

/* One that writes `n` bytes: HALF of them are there when the process dies; whole pages, as direct writes want it. */
#define WRITE(name, parameters, types, arguments)            \
    ssize_t name parameters {                                \
        REAL(ssize_t, #name, types);                         \
        int last = atomic_load(&armed) && of_fd(fd, path) && due(#name, path); \
        if (last && mode == HALF) n = n > 8192 ? n / 2 & ~4095UL : n / 2;      \
        ssize_t result = real arguments;                     \
        if (last) die();                                     \
        return result;                                       \
    }

WRITE(write, (int fd, const void *data, size_t n), TYPES(int, const void *, size_t), (fd, data, n))
WRITE(pwrite, (int fd, const void *data, size_t n, off_t at), TYPES(int, const void *, size_t, off_t), (fd, data, n, at))
WRITE(pwrite64, (int fd, const void *data, size_t n, off64_t at), TYPES(int, const void *, size_t, off64_t), (fd, data, n, at))
WRITE(sendfile, (int fd, int in, off_t *at, size_t n), TYPES(int, int, off_t *, size_t), (fd, in, at, n))
WRITE(sendfile64, (int fd, int in, off64_t *at, size_t n), TYPES(int, int, off64_t *, size_t), (fd, in, at, n))
WRITE(copy_file_range, (int in, off64_t *from, int fd, off64_t *at, size_t n, unsigned flags),
      TYPES(int, off64_t *, int, off64_t *, size_t, unsigned), (in, from, fd, at, n, flags))
CALL(ssize_t, writev, (int fd, const struct iovec *v, int n), TYPES(int, const struct iovec *, int), (fd, v, n), of_fd(fd, path))
CALL(ssize_t, pwritev, (int fd, const struct iovec *v, int n, off_t at), TYPES(int, const struct iovec *, int, off_t), (fd, v, n, at), of_fd(fd, path))
CALL(ssize_t, pwritev64, (int fd, const struct iovec *v, int n, off64_t at), TYPES(int, const struct iovec *, int, off64_t), (fd, v, n, at), of_fd(fd, path))
CALL(ssize_t, pwritev2, (int fd, const struct iovec *v, int n, off_t at, int flags), TYPES(int, const struct iovec *, int, off_t, int), (fd, v, n, at, flags), of_fd(fd, path))
CALL(ssize_t, pwritev64v2, (int fd, const struct iovec *v, int n, off64_t at, int flags), TYPES(int, const struct iovec *, int, off64_t, int), (fd, v, n, at, flags), of_fd(fd, path))

CALL(int, fsync, (int fd), TYPES(int), (fd), of_fd(fd, path))
CALL(int, fdatasync, (int fd), TYPES(int), (fd), of_fd(fd, path))
CALL(int, ftruncate, (int fd, off_t n), TYPES(int, off_t), (fd, n), of_fd(fd, path))
CALL(int, ftruncate64, (int fd, off64_t n), TYPES(int, off64_t), (fd, n), of_fd(fd, path))
CALL(int, fallocate, (int fd, int how, off_t at, off_t n), TYPES(int, int, off_t, off_t), (fd, how, at, n), of_fd(fd, path))
CALL(int, fallocate64, (int fd, int how, off64_t at, off64_t n), TYPES(int, int, off64_t, off64_t), (fd, how, at, n), of_fd(fd, path))
CALL(int, posix_fallocate, (int fd, off_t at, off_t n), TYPES(int, off_t, off_t), (fd, at, n), of_fd(fd, path))
CALL(int, posix_fallocate64, (int fd, off64_t at, off64_t n), TYPES(int, off64_t, off64_t), (fd, at, n), of_fd(fd, path))
CALL(int, fchmod, (int fd, mode_t m), TYPES(int, mode_t), (fd, m), of_fd(fd, path))

CALL(int, truncate, (const char *p, off_t n), TYPES(const char *, off_t), (p, n), of_path(AT_FDCWD, p, path))
CALL(int, truncate64, (const char *p, off64_t n), TYPES(const char *, off64_t), (p, n), of_path(AT_FDCWD, p, path))
CALL(int, chmod, (const char *p, mode_t m), TYPES(const char *, mode_t), (p, m), of_path(AT_FDCWD, p, path))
CALL(int, fchmodat, (int d, const char *p, mode_t m, int f), TYPES(int, const char *, mode_t, int), (d, p, m, f), of_path(d, p, path))
CALL(int, utimensat, (int d, const char *p, const struct timespec t[2], int f), TYPES(int, const char *, const struct timespec *, int), (d, p, t, f), of_path(d, p, path))
CALL(int, unlink, (const char *p), TYPES(const char *), (p), of_path(AT_FDCWD, p, path))
CALL(int, unlinkat, (int d, const char *p, int f), TYPES(int, const char *, int), (d, p, f), of_path(d, p, path))
CALL(int, remove, (const char *p), TYPES(const char *), (p), of_path(AT_FDCWD, p, path))
CALL(int, rmdir, (const char *p), TYPES(const char *), (p), of_path(AT_FDCWD, p, path))
CALL(int, mkdir, (const char *p, mode_t m), TYPES(const char *, mode_t), (p, m), of_path(AT_FDCWD, p, path))
CALL(int, mkdirat, (int d, const char *p, mode_t m), TYPES(int, const char *, mode_t), (d, p, m), of_path(d, p, path))
CALL(int, rename, (const char *p, const char *q), TYPES(const char *, const char *), (p, q), of_path(AT_FDCWD, p, path) || of_path(AT_FDCWD, q, path))
CALL(int, renameat, (int d, const char *p, int e, const char *q), TYPES(int, const char *, int, const char *), (d, p, e, q), of_path(d, p, path) || of_path(e, q, path))
CALL(int, renameat2, (int d, const char *p, int e, const char *q, unsigned f), TYPES(int, const char *, int, const char *, unsigned), (d, p, e, q, f), of_path(d, p, path) || of_path(e, q, path))
CALL(int, link, (const char *p, const char *q), TYPES(const char *, const char *), (p, q), of_path(AT_FDCWD, q, path))
CALL(int, linkat, (int d, const char *p, int e, const char *q, int f), TYPES(int, const char *, int, const char *, int), (d, p, e, q, f), of_path(e, q, path))
CALL(int, symlink, (const char *p, const char *q), TYPES(const char *, const char *), (p, q), of_path(AT_FDCWD, q, path))
CALL(int, symlinkat, (const char *p, int e, const char *q), TYPES(const char *, int, const char *), (p, e, q), of_path(e, q, path))
CALL(int, creat, (const char *p, mode_t m), TYPES(const char *, mode_t), (p, m), of_path(AT_FDCWD, p, path))
CALL(int, creat64, (const char *p, mode_t m), TYPES(const char *, mode_t), (p, m), of_path(AT_FDCWD, p, path))
CALL(FILE *, fopen, (const char *p, const char *m), TYPES(const char *, const char *), (p, m), m[0] != 'r' && of_path(AT_FDCWD, p, path))
CALL(FILE *, fopen64, (const char *p, const char *m), TYPES(const char *, const char *), (p, m), m[0] != 'r' && of_path(AT_FDCWD, p, path))

#define MODE                                                  \
    mode_t how = 0;                                           \
    if (flags & O_CREAT || (flags & O_TMPFILE) == O_TMPFILE) {                     \
        va_list more;                                         \
        va_start(more, flags);                                \
        how = va_arg(more, mode_t);                           \
        va_end(more);                                         \
    }
#define OPEN(name)                                                                          \
    int name(const char *p, int flags, ...) {                                               \
        REAL(int, #name, const char *, int, mode_t);                                        \
        MODE                                                                                \
        int last = flags & (O_CREAT | O_TRUNC) && atomic_load(&armed) && of_path(AT_FDCWD, p, path) && due(#name, path); \
        int result = real(p, flags, how);                                                   \
        if (last) die();                                                                    \
        return result;                                                                      \
    }
#define OPENAT(name)                                                                        \
    int name(int folder, const char *p, int flags, ...) {                                   \
        REAL(int, #name, int, const char *, int, mode_t);                                   \
        MODE                                                                                \
        int last = flags & (O_CREAT | O_TRUNC) && atomic_load(&armed) && of_path(folder, p, path) && due(#name, path); \
        int result = real(folder, p, flags, how);                                           \
        if (last) die();                                                                    \
        return result;                                                                      \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

/* Lets a program that writes files and reads them back run on a read-only mount: what it writes goes to the folder that
 * is the mount's under store, what it reads comes through the mount. Preloaded (LD_PRELOAD) into the suites' processes.
 *
 * Owns: redirecting the calls that open for writing, make, remove, rename or mark files below $WRITE_BEHIND_MOUNT to
 * $WRITE_BEHIND_STORE, and counting the opens that were left to the mount (so that a test which read nothing through
 * it is not counted as a proof). Leaves every read, stat and listing alone.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <unistd.h>

/* In a file that all processes of a suite share ($WRITE_BEHIND_COUNT), since many tests read in a child. */
static atomic_long none, *reads = &none;

__attribute__((constructor)) static void share_the_count(void) {
    const char *path = getenv("WRITE_BEHIND_COUNT");
    int fd = path ? syscall(SYS_openat, AT_FDCWD, path, O_RDWR) : -1;
    if (fd < 0) return;
    void *shared = mmap(NULL, sizeof *reads, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (shared != MAP_FAILED) reads = shared;
    syscall(SYS_close, fd);
}

/* How many files and directories were opened for reading on the mount. */
long write_behind_reads(void) { return *reads; }

/* The absolute path below the mount, from its root on ("" or "/..."), in `buffer`; NULL if it lies elsewhere. */
static const char *below(int dirfd, const char *path, char buffer[2 * PATH_MAX]) {
    const char *mount = getenv("WRITE_BEHIND_MOUNT");
    if (!mount || !path) return NULL;
    if (path[0] == '/') {
        if (strlen(path) >= PATH_MAX) return NULL;
        strcpy(buffer, path);
    } else {
        if (strlen(path) >= PATH_MAX) return NULL;
        if (dirfd == AT_FDCWD) {
            if (!getcwd(buffer, PATH_MAX)) return NULL;
        } else {
            char link[64];
            snprintf(link, sizeof link, "/proc/self/fd/%d", dirfd);
            ssize_t length = readlink(link, buffer, PATH_MAX - 1);
            if (length < 0) return NULL;
            buffer[length] = 0;
        }
        strcat(buffer, "/");
        strcat(buffer, path);
    }
    size_t length = strlen(mount);
    if (strncmp(buffer, mount, length) || (buffer[length] && buffer[length] != '/')) return NULL;
    return buffer + length;
}

/* Where a change to `path` goes: to the store if it lies on the mount, else where it was meant. */
static const char *behind(int dirfd, const char *path, char to[4 * PATH_MAX]) {
    char from[2 * PATH_MAX];
    const char *rest = below(dirfd, path, from);
    if (!rest) return path;
    snprintf(to, 4 * PATH_MAX, "%s%s", getenv("WRITE_BEHIND_STORE"), rest);
    return to;
}

static int writes(int flags) {
    return (flags & O_ACCMODE) != O_RDONLY || flags & (O_CREAT | O_TRUNC) || (flags & O_TMPFILE) == O_TMPFILE;
}

static int opened(int fd, int dirfd, const char *path) {
    char buffer[2 * PATH_MAX];
    if (fd >= 0 && below(dirfd, path, buffer)) (*reads)++;
    return fd;
}

#define NEXT(type, name) ((type)dlsym(RTLD_NEXT, name))
#define MODE(flags) \
    mode_t mode = 0; \
    if ((flags) & (O_CREAT | O_TMPFILE)) { va_list more; va_start(more, flags); mode = va_arg(more, mode_t); va_end(more); }

#define OPEN(name) int name(const char *path, int flags, ...) { \
    MODE(flags) char to[4 * PATH_MAX]; \
    int (*next)(const char *, int, ...) = NEXT(int (*)(const char *, int, ...), #name); \
    if (writes(flags)) return next(behind(AT_FDCWD, path, to), flags, mode); \
    return opened(next(path, flags, mode), AT_FDCWD, path); }
OPEN(open) OPEN(open64)

#define OPEN_2(name) int name(const char *path, int flags) { \
    char to[4 * PATH_MAX]; \
    int (*next)(const char *, int) = NEXT(int (*)(const char *, int), #name); \
    if (writes(flags)) return next(behind(AT_FDCWD, path, to), flags); \
    return opened(next(path, flags), AT_FDCWD, path); }
OPEN_2(__open_2) OPEN_2(__open64_2)

#define OPENAT(name) int name(int dirfd, const char *path, int flags, ...) { \
    MODE(flags) char to[4 * PATH_MAX]; \
    int (*next)(int, const char *, int, ...) = NEXT(int (*)(int, const char *, int, ...), #name); \
    if (writes(flags)) return next(dirfd, behind(dirfd, path, to), flags, mode); \
    return opened(next(dirfd, path, flags, mode), dirfd, path); }
OPENAT(openat) OPENAT(openat64)

#define FOPEN(name) FILE *name(const char *path, const char *mode) { \
    char to[4 * PATH_MAX]; \
    FILE *(*next)(const char *, const char *) = NEXT(FILE *(*)(const char *, const char *), #name); \
    if (strpbrk(mode, "wa+")) return next(behind(AT_FDCWD, path, to), mode); \
    FILE *file = next(path, mode); \
    opened(file ? 0 : -1, AT_FDCWD, path); \
    return file; }
FOPEN(fopen) FOPEN(fopen64)

DIR *opendir(const char *path) {
    DIR *directory = NEXT(DIR *(*)(const char *), "opendir")(path);
    opened(directory ? 0 : -1, AT_FDCWD, path);
    return directory;
}

/* name(path, ...) and name(dirfd, path, ...): the same call, on the path behind. */
#define CHANGE(name, parameters, types, ...) int name parameters { \
    char to[4 * PATH_MAX]; path = behind(AT_FDCWD, path, to); \
    return NEXT(int (*) types, #name)(__VA_ARGS__); }
#define CHANGE_AT(name, parameters, types, ...) int name parameters { \
    char to[4 * PATH_MAX]; path = behind(dirfd, path, to); \
    return NEXT(int (*) types, #name)(__VA_ARGS__); }
CHANGE(creat, (const char *path, mode_t mode), (const char *, mode_t), path, mode)
CHANGE(creat64, (const char *path, mode_t mode), (const char *, mode_t), path, mode)
CHANGE(mkdir, (const char *path, mode_t mode), (const char *, mode_t), path, mode)
CHANGE(rmdir, (const char *path), (const char *), path)
CHANGE(unlink, (const char *path), (const char *), path)
CHANGE(remove, (const char *path), (const char *), path)
CHANGE(chmod, (const char *path, mode_t mode), (const char *, mode_t), path, mode)
CHANGE(chown, (const char *path, uid_t uid, gid_t gid), (const char *, uid_t, gid_t), path, uid, gid)
CHANGE(lchown, (const char *path, uid_t uid, gid_t gid), (const char *, uid_t, gid_t), path, uid, gid)
CHANGE(truncate, (const char *path, off_t size), (const char *, off_t), path, size)
CHANGE(truncate64, (const char *path, off64_t size), (const char *, off64_t), path, size)
CHANGE(utimes, (const char *path, const struct timeval times[2]), (const char *, const struct timeval *), path, times)
CHANGE(mkfifo, (const char *path, mode_t mode), (const char *, mode_t), path, mode)
CHANGE(mknod, (const char *path, mode_t mode, dev_t device), (const char *, mode_t, dev_t), path, mode, device)
CHANGE_AT(mkdirat, (int dirfd, const char *path, mode_t mode), (int, const char *, mode_t), dirfd, path, mode)
CHANGE_AT(unlinkat, (int dirfd, const char *path, int flags), (int, const char *, int), dirfd, path, flags)
CHANGE_AT(fchmodat, (int dirfd, const char *path, mode_t mode, int flags), (int, const char *, mode_t, int),
          dirfd, path, mode, flags)
CHANGE_AT(utimensat, (int dirfd, const char *path, const struct timespec times[2], int flags),
          (int, const char *, const struct timespec *, int), dirfd, path, times, flags)

int access(const char *path, int mode) {
    char to[4 * PATH_MAX];
    if (mode & W_OK) path = behind(AT_FDCWD, path, to);
    return NEXT(int (*)(const char *, int), "access")(path, mode);
}

int rename(const char *path, const char *target) {
    char to[4 * PATH_MAX], target_to[4 * PATH_MAX];
    return NEXT(int (*)(const char *, const char *), "rename")(
        behind(AT_FDCWD, path, to), behind(AT_FDCWD, target, target_to));
}

int renameat(int dirfd, const char *path, int target_dirfd, const char *target) {
    char to[4 * PATH_MAX], target_to[4 * PATH_MAX];
    return NEXT(int (*)(int, const char *, int, const char *), "renameat")(
        dirfd, behind(dirfd, path, to), target_dirfd, behind(target_dirfd, target, target_to));
}

int link(const char *path, const char *target) {
    char to[4 * PATH_MAX], target_to[4 * PATH_MAX];
    return NEXT(int (*)(const char *, const char *), "link")(
        behind(AT_FDCWD, path, to), behind(AT_FDCWD, target, target_to));
}

int linkat(int dirfd, const char *path, int target_dirfd, const char *target, int flags) {
    char to[4 * PATH_MAX], target_to[4 * PATH_MAX];
    return NEXT(int (*)(int, const char *, int, const char *, int), "linkat")(
        dirfd, behind(dirfd, path, to), target_dirfd, behind(target_dirfd, target, target_to), flags);
}

/* A store holds no symbolic links; and one that leads into the mount would have the daemon wait for itself. */
int symlink(const char *text, const char *path) {
    char from[2 * PATH_MAX];
    if (below(AT_FDCWD, path, from)) { errno = EPERM; return -1; }
    return NEXT(int (*)(const char *, const char *), "symlink")(text, path);
}

int symlinkat(const char *text, int dirfd, const char *path) {
    char from[2 * PATH_MAX];
    if (below(dirfd, path, from)) { errno = EPERM; return -1; }
    return NEXT(int (*)(const char *, int, const char *), "symlinkat")(text, dirfd, path);
}

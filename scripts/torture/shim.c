// Loaded into a process by LD_PRELOAD: sees each operation that changes a file below a folder, and records it, makes it
// fail, or ends the process there. Nothing happens before `torture_start`; see world.py.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { kWatch, kFail, kFailForever, kSignal, kCall };

static char root[PATH_MAX];
static size_t root_length;
static int mode, given, log_fd = -1;
static long at, seen;
static void (*call)(void);
static double clock_step;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static char known[65536];  // 1 for an open file below the folder

#define REAL(name) __typeof__(name)* real = (__typeof__(name)*)dlsym(RTLD_NEXT, #name)

void torture_start(const char* folder, int what, long when, int value, int log, void (*function)(void)) {
  mode = what, at = when, given = value, log_fd = log, call = function, seen = 0;
  root_length = strlen(folder);
  memcpy(root, folder, root_length + 1);
}

long torture_seen(void) { return seen; }

void torture_clock(double seconds) { clock_step = seconds; }

// The absolute path of `path`; 0 if it is not below the folder.
static int inside(int folder, const char* path, char* out) {
  if (!root_length || !path) return 0;
  if (path[0] == '/') {
    snprintf(out, PATH_MAX, "%s", path);
  } else {
    char link[64], base[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    const ssize_t n = folder == AT_FDCWD ? (getcwd(base, sizeof base) ? (ssize_t)strlen(base) : -1)
                                         : readlink(link, base, sizeof base - 1);
    if (n < 0) return 0;
    base[n] = 0;
    if (snprintf(out, PATH_MAX, "%s/%s", base, path) >= PATH_MAX) return 0;
  }
  return strncmp(out, root, root_length) == 0 && (out[root_length] == '/' || out[root_length] == 0);
}

static void put(const char* data, size_t n) {
  REAL(write);
  while (n) {
    const ssize_t written = real(log_fd, data, n);
    if (written <= 0) _exit(99);
    data += written, n -= (size_t)written;
  }
}

// One line of JSON, and the bytes that were written, if any.
static void record(const char* what, const char* path, const char* other, unsigned long inode, long offset,
                   const void* data, size_t size) {
  if (log_fd < 0) return;
  char line[3 * PATH_MAX];
  const int n = snprintf(line, sizeof line, "[\"%s\", \"%s\", \"%s\", %lu, %ld, %zu]\n", what, path, other, inode, offset, size);
  pthread_mutex_lock(&mutex);
  put(line, (size_t)n);
  if (size && data) put(data, size);
  pthread_mutex_unlock(&mutex);
}

// Counts an operation; nonzero if it must fail, with errno set. `grows`: whether a full disk forbids it.
static int strikes(int grows) {
  const long now = __sync_add_and_fetch(&seen, 1);
  if (mode == kSignal && now == at) {
    kill(getpid(), given);
    if (given == SIGKILL) pause();
  } else if (mode == kCall && now == at) {
    const size_t kept = root_length;
    root_length = 0;
    call();
    root_length = kept;
  } else if ((mode == kFail && now == at) || (mode == kFailForever && now >= at && grows)) {
    errno = given;
    return 1;
  }
  return 0;
}

static unsigned long inode_of(int fd) {
  struct stat s;
  return fstat(fd, &s) ? 0 : (unsigned long)s.st_ino;
}

static int opened(int fd, const char* path, int flags, int existed) {
  if (fd >= 0 && fd < (int)sizeof known) {
    known[fd] = 1;
    record(existed ? (flags & O_TRUNC ? "truncate" : "open") : "create", path, "", inode_of(fd), 0, NULL, 0);
  }
  return fd;
}

#define CHANGES(flags) ((flags) & (O_CREAT | O_TRUNC | O_WRONLY | O_RDWR))

static int open_as(int folder, const char* path, int flags, mode_t bits, const char* name) {
  int (*real)(int, const char*, int, ...) = (int (*)(int, const char*, int, ...))dlsym(RTLD_NEXT, name);
  char full[PATH_MAX];
  if (!inside(folder, path, full)) return real(folder, path, flags, bits);
  if (!CHANGES(flags)) {  // a folder is opened to be synced
    const int fd = real(folder, path, flags, bits);
    return opened(fd, full, flags, 1);
  }
  const int existed = faccessat(folder, path, F_OK, 0) == 0;
  if (strikes(!existed)) return -1;
  return opened(real(folder, path, flags, bits), full, flags, existed);
}

#define BITS(flags) \
  va_list rest; \
  va_start(rest, flags); \
  const mode_t bits = (flags) & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
  va_end(rest)

int open(const char* path, int flags, ...) { BITS(flags); return open_as(AT_FDCWD, path, flags, bits, "openat"); }
int open64(const char* path, int flags, ...) { BITS(flags); return open_as(AT_FDCWD, path, flags, bits, "openat64"); }
int openat(int d, const char* path, int flags, ...) { BITS(flags); return open_as(d, path, flags, bits, "openat"); }
int openat64(int d, const char* path, int flags, ...) { BITS(flags); return open_as(d, path, flags, bits, "openat64"); }

static FILE* fopen_as(const char* path, const char* how, const char* name) {
  FILE* (*real)(const char*, const char*) = (FILE * (*)(const char*, const char*)) dlsym(RTLD_NEXT, name);
  char full[PATH_MAX];
  if (!inside(AT_FDCWD, path, full) || !strpbrk(how, "wa+")) return real(path, how);
  const int existed = access(path, F_OK) == 0;
  if (strikes(!existed)) return NULL;
  FILE* file = real(path, how);
  if (file) opened(fileno(file), full, how[0] == 'w' ? O_TRUNC : 0, existed);
  return file;
}
FILE* fopen(const char* path, const char* how) { return fopen_as(path, how, "fopen"); }
FILE* fopen64(const char* path, const char* how) { return fopen_as(path, how, "fopen64"); }

static int is_known(int fd) { return root_length && fd >= 0 && fd < (int)sizeof known && known[fd]; }

int close(int fd) {
  REAL(close);
  if (fd >= 0 && fd < (int)sizeof known) known[fd] = 0;
  return real(fd);
}

static long offset_of(int fd) {
  if (fcntl(fd, F_GETFL) & O_APPEND) {
    struct stat s;
    return fstat(fd, &s) ? 0 : (long)s.st_size;
  }
  return (long)lseek(fd, 0, SEEK_CUR);
}

ssize_t write(int fd, const void* data, size_t size) {
  REAL(write);
  if (!is_known(fd)) return real(fd, data, size);
  const long offset = offset_of(fd);
  if (strikes(1)) {
    if (size > 1) (void)!real(fd, data, size / 2);  // half of it still fits
    errno = given;
    return -1;
  }
  const ssize_t n = real(fd, data, size);
  if (n > 0) record("write", "", "", inode_of(fd), offset, data, (size_t)n);
  return n;
}

ssize_t writev(int fd, const struct iovec* parts, int count) {
  REAL(writev);
  if (!is_known(fd)) return real(fd, parts, count);
  ssize_t total = 0;
  for (int i = 0; i < count; ++i) {
    const ssize_t n = write(fd, parts[i].iov_base, parts[i].iov_len);
    if (n < 0) return total ? total : -1;
    total += n;
    if ((size_t)n < parts[i].iov_len) break;
  }
  return total;
}

static ssize_t pwrite_as(int fd, const void* data, size_t size, off_t offset, const char* name) {
  ssize_t (*real)(int, const void*, size_t, off_t) = (ssize_t(*)(int, const void*, size_t, off_t))dlsym(RTLD_NEXT, name);
  if (is_known(fd) && strikes(1)) return -1;
  const ssize_t n = real(fd, data, size, offset);
  if (n > 0 && is_known(fd)) record("write", "", "", inode_of(fd), (long)offset, data, (size_t)n);
  return n;
}
ssize_t pwrite(int fd, const void* d, size_t n, off_t o) { return pwrite_as(fd, d, n, o, "pwrite"); }
ssize_t pwrite64(int fd, const void* d, size_t n, off_t o) { return pwrite_as(fd, d, n, o, "pwrite64"); }

static int ftruncate_as(int fd, off_t size, const char* name) {
  int (*real)(int, off_t) = (int (*)(int, off_t))dlsym(RTLD_NEXT, name);
  if (is_known(fd) && strikes(1)) return -1;
  const int done = real(fd, size);
  if (!done && is_known(fd)) record("resize", "", "", inode_of(fd), (long)size, NULL, 0);
  return done;
}
int ftruncate(int fd, off_t size) { return ftruncate_as(fd, size, "ftruncate"); }
int ftruncate64(int fd, off_t size) { return ftruncate_as(fd, size, "ftruncate64"); }

// Copies inside the kernel are refused: what copies then reads and writes.
ssize_t sendfile(int out, int in, off_t* offset, size_t n) {
  ssize_t (*real)(int, int, off_t*, size_t) = (ssize_t(*)(int, int, off_t*, size_t))dlsym(RTLD_NEXT, "sendfile");
  return is_known(out) ? (errno = EINVAL, -1) : real(out, in, offset, n);
}
ssize_t sendfile64(int out, int in, off_t* offset, size_t n) { return sendfile(out, in, offset, n); }
ssize_t copy_file_range(int in, off_t* i, int out, off_t* o, size_t n, unsigned flags) {
  REAL(copy_file_range);
  return is_known(out) ? (errno = EXDEV, -1) : real(in, i, out, o, n, flags);
}

static int sync_as(int fd, const char* name) {
  int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, name);
  if (!is_known(fd)) return real(fd);
  if (strikes(1)) return -1;
  record("sync", "", "", inode_of(fd), 0, NULL, 0);
  return 0;  // power never really fails here
}
int fsync(int fd) { return sync_as(fd, "fsync"); }
int fdatasync(int fd) { return sync_as(fd, "fdatasync"); }

static int rename_as(int d, const char* from, int e, const char* to, unsigned flags) {
  REAL(renameat2);
  char old[PATH_MAX], new[PATH_MAX];
  const int a = inside(d, from, old), b = inside(e, to, new);
  if ((a || b) && strikes(1)) return -1;
  const int done = real(d, from, e, to, flags);
  if (!done && (a || b)) record("rename", old, new, 0, 0, NULL, 0);
  return done;
}
int rename(const char* from, const char* to) { return rename_as(AT_FDCWD, from, AT_FDCWD, to, 0); }
int renameat(int d, const char* from, int e, const char* to) { return rename_as(d, from, e, to, 0); }
int renameat2(int d, const char* from, int e, const char* to, unsigned f) { return rename_as(d, from, e, to, f); }

static int remove_as(int folder, const char* path, int flags) {
  REAL(unlinkat);
  char full[PATH_MAX];
  if (!inside(folder, path, full)) return real(folder, path, flags);
  if (strikes(0)) return -1;
  const int done = real(folder, path, flags);
  if (!done) record("remove", full, "", 0, 0, NULL, 0);
  return done;
}
int unlink(const char* path) { return remove_as(AT_FDCWD, path, 0); }
int unlinkat(int d, const char* path, int flags) { return remove_as(d, path, flags); }
int rmdir(const char* path) { return remove_as(AT_FDCWD, path, AT_REMOVEDIR); }

int mkdirat(int folder, const char* path, mode_t bits) {
  REAL(mkdirat);
  char full[PATH_MAX];
  if (!inside(folder, path, full)) return real(folder, path, bits);
  if (strikes(1)) return -1;
  const int done = real(folder, path, bits);
  struct stat s;
  if (!done && !fstatat(folder, path, &s, 0)) record("mkdir", full, "", (unsigned long)s.st_ino, 0, NULL, 0);
  return done;
}
int mkdir(const char* path, mode_t bits) { return mkdirat(AT_FDCWD, path, bits); }

int clock_gettime(clockid_t id, struct timespec* t) {
  static int (*real)(clockid_t, struct timespec*);
  if (!real) real = (int (*)(clockid_t, struct timespec*))dlsym(RTLD_NEXT, "clock_gettime");
  const int done = real(id, t);
  if (clock_step && id == CLOCK_REALTIME) t->tv_sec += (time_t)(clock_step * (seen % 2 ? 1 : -1));  // there and back
  return done;
}

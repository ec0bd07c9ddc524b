// SPDX-License-Identifier: Apache-2.0
// offline_guard.c - preloaded into a program that must not use the network: notes the first attempt and ends it.
//
// Every address family but AF_UNIX counts: the internet's, and those that only ask the kernel about it
// (AF_NETLINK, AF_PACKET). AF_UNIX stays on the machine: sound servers are talked to that way. Names are looked up
// by the C library with sockets that no preloaded function sees, so asking for one counts, whatever it is.
// What a program does by a system call of its own is not seen; no library that pocketphi uses does so.
//
// The attempt is one line, "<function> <family>", added to the file that OFFLINE_GUARD names; the exit code is 97.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

static _Noreturn void refuse(const char *function, int family) {
    char line[64];
    int n = snprintf(line, sizeof line, "%s %d\n", function, family);
    const char *path = getenv("OFFLINE_GUARD");
    int file = path ? open(path, O_WRONLY | O_APPEND | O_CREAT, 0600) : -1;
    if (file < 0 || write(file, line, (size_t)n) != n) abort();
    _exit(97);
}

// What the program would have called. POSIX lets the pointer be read as a function's; ISO C has no word for it.
static void *next(const char *function) {
    void *found = dlsym(RTLD_NEXT, function);
    if (!found) abort();
    return found;
}

int socket(int family, int type, int protocol) {
    if (family != AF_UNIX) refuse("socket", family);
    int (*real)(int, int, int);
    *(void **)&real = next("socket");
    return real(family, type, protocol);
}

int connect(int handle, const struct sockaddr *to, socklen_t n) {
    if (to && to->sa_family != AF_UNIX) refuse("connect", to->sa_family);
    int (*real)(int, const struct sockaddr *, socklen_t);
    *(void **)&real = next("connect");
    return real(handle, to, n);
}

ssize_t sendto(int handle, const void *data, size_t size, int flags, const struct sockaddr *to, socklen_t n) {
    if (to && to->sa_family != AF_UNIX) refuse("sendto", to->sa_family);
    ssize_t (*real)(int, const void *, size_t, int, const struct sockaddr *, socklen_t);
    *(void **)&real = next("sendto");
    return real(handle, data, size, flags, to, n);
}

int getaddrinfo(const char *host, const char *service, const struct addrinfo *hints, struct addrinfo **found) {
    (void)host, (void)service, (void)found;
    refuse("getaddrinfo", hints ? hints->ai_family : AF_UNSPEC);
}

struct hostent *gethostbyname(const char *host) {
    (void)host;
    refuse("gethostbyname", AF_INET);
}

int gethostbyname_r(const char *host, struct hostent *entry, char *buffer, size_t size, struct hostent **found,
                    int *error) {
    (void)host, (void)entry, (void)buffer, (void)size, (void)found, (void)error;
    refuse("gethostbyname_r", AF_INET);
}

// SPDX-License-Identifier: Apache-2.0
/* Memory of whole pages, and pages that nobody may touch. */
#ifndef CMB_PAGES_H
#define CMB_PAGES_H

#include <stdbool.h>
#include <stddef.h>

#ifdef _WIN32
#define WIN32_LEAN_AND_MEAN
#include <windows.h>

static size_t page_bytes(void) {
    SYSTEM_INFO info;
    GetSystemInfo(&info);
    return info.dwPageSize;
}

/* NULL if there is no memory. */
static void *map_pages(size_t bytes) { return VirtualAlloc(NULL, bytes, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE); }

static bool forbid_page(void *page) {
    DWORD before;
    return VirtualProtect(page, page_bytes(), PAGE_NOACCESS, &before);
}
#else
#include <sys/mman.h>
#include <unistd.h>

static size_t page_bytes(void) { return (size_t)sysconf(_SC_PAGESIZE); }

/* NULL if there is no memory. */
static void *map_pages(size_t bytes) {
    void *pages = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return pages == MAP_FAILED ? NULL : pages;
}

static bool forbid_page(void *page) { return mprotect(page, page_bytes(), PROT_NONE) == 0; }
#endif

#endif

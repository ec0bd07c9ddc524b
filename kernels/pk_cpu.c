// SPDX-License-Identifier: Apache-2.0
// pk_cpu.c - CPU features: CPUID and XGETBV, hwcap, sysctl; and the mask for tests.
#include "pk_cpu.h"

#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

static const pk_cpu_feature features[] = {
    {"avx2", PK_CPU_AVX2},
    {"fma", PK_CPU_FMA},
    {"f16c", PK_CPU_F16C},
    {"avx512f", PK_CPU_AVX512F},
    {"avx512bw", PK_CPU_AVX512BW},
    {"avx512vl", PK_CPU_AVX512VL},
    {"avx512dq", PK_CPU_AVX512DQ},
    {"avx512vnni", PK_CPU_AVX512_VNNI},
    {"avx512bf16", PK_CPU_AVX512_BF16},
    {"avxvnni", PK_CPU_AVX_VNNI},
    {"neon", PK_CPU_NEON},
    {"dotprod", PK_CPU_DOTPROD},
    {"i8mm", PK_CPU_I8MM},
};
enum { N_FEATURES = sizeof features / sizeof features[0] };

// Above every feature bit: the answer has been worked out, the mask could not be read.
#define KNOWN (1u << 31)
#define BAD_MASK (1u << 30)

#if defined(__x86_64__)

// The register file the operating system saves and restores (XCR0). CPUID tells what the CPU can do;
// an instruction still faults if the system has not switched its registers on.
static uint32_t xcr0(void) {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

static unsigned if_set(uint32_t reg, unsigned bit, unsigned feature) {
    return (reg >> bit) & 1u ? feature : 0u;
}

// Bit numbers: Intel SDM volume 2A, CPUID leaves 1 and 7; AMD uses the same.
static unsigned detect(void) {
    enum { XMM_YMM = 0x6, OPMASK_ZMM = 0xe0 };
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
    const unsigned osxsave = 27, avx = 28;
    if (!(c >> osxsave & 1u) || !(c >> avx & 1u)) return 0;
    const uint32_t saved = xcr0();
    if ((saved & XMM_YMM) != XMM_YMM) return 0;
    unsigned found = if_set(c, 12, PK_CPU_FMA) | if_set(c, 29, PK_CPU_F16C);

    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return found;
    const uint32_t max_subleaf = a;
    const bool zmm = (saved & OPMASK_ZMM) == OPMASK_ZMM && (b >> 16 & 1u);
    found |= if_set(b, 5, PK_CPU_AVX2);
    if (zmm) {
        found |= PK_CPU_AVX512F | if_set(b, 17, PK_CPU_AVX512DQ) | if_set(b, 30, PK_CPU_AVX512BW) |
                 if_set(b, 31, PK_CPU_AVX512VL) | if_set(c, 11, PK_CPU_AVX512_VNNI);
    }
    if (max_subleaf < 1 || !__get_cpuid_count(7, 1, &a, &b, &c, &d)) return found;
    found |= if_set(a, 4, PK_CPU_AVX_VNNI);
    if (zmm) found |= if_set(a, 5, PK_CPU_AVX512_BF16);
    return found;
}

#elif defined(__aarch64__) && defined(__linux__)

// Bit numbers: Linux, arch/arm64/include/uapi/asm/hwcap.h; old C libraries lack some of the names.
static unsigned detect(void) {
    const unsigned long hwcap = getauxval(AT_HWCAP), hwcap2 = getauxval(AT_HWCAP2);
    const unsigned long asimd = 1ul << 1, asimddp = 1ul << 20, i8mm = 1ul << 13;
    return (hwcap & asimd ? PK_CPU_NEON : 0u) | (hwcap & asimddp ? PK_CPU_DOTPROD : 0u) |
           (hwcap2 & i8mm ? PK_CPU_I8MM : 0u);
}

#elif defined(__aarch64__) && defined(__APPLE__)

static unsigned if_present(const char *name, unsigned feature) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, NULL, 0) == 0 && value ? feature : 0u;
}

static unsigned detect(void) {
    return PK_CPU_NEON | if_present("hw.optional.arm.FEAT_DotProd", PK_CPU_DOTPROD) |
           if_present("hw.optional.arm.FEAT_I8MM", PK_CPU_I8MM);
}

#elif defined(__aarch64__)

static unsigned detect(void) { return PK_CPU_NEON; }  // part of the base architecture

#else

static unsigned detect(void) { return 0; }

#endif

static unsigned bit_of(const char *name, size_t length) {
    for (size_t i = 0; i < N_FEATURES; i++) {
        if (strlen(features[i].name) == length && !memcmp(features[i].name, name, length)) return features[i].bit;
    }
    return 0;
}

bool pk_cpu_parse(const char *names, unsigned *bits) {
    *bits = 0;
    if (!strcmp(names, "none")) return true;
    unsigned all = 0;
    for (;;) {
        const size_t length = strcspn(names, ",");
        const unsigned bit = bit_of(names, length);
        if (!bit) return false;
        all |= bit;
        if (!names[length]) break;
        names += length + 1;
    }
    *bits = all;
    return true;
}

static unsigned work_out(void) {
    const char *names = getenv("POCKETPHI_CPU_MASK");
    unsigned mask = ~0u;
    if (names && *names && !pk_cpu_parse(names, &mask)) return KNOWN | BAD_MASK;
    return KNOWN | (detect() & mask);
}

// Two threads that come here first both work it out, and store the same value.
static unsigned state(void) {
    static _Atomic unsigned cached;
    unsigned now = atomic_load_explicit(&cached, memory_order_relaxed);
    if (!now) {
        now = work_out();
        atomic_store_explicit(&cached, now, memory_order_relaxed);
    }
    return now;
}

const pk_cpu_feature *pk_cpu_at(size_t i) { return i < N_FEATURES ? &features[i] : NULL; }

unsigned pk_cpu_features(void) { return state() & ~(KNOWN | BAD_MASK); }

bool pk_cpu_has(unsigned needs) { return (pk_cpu_features() & needs) == needs; }

bool pk_cpu_mask_is_valid(void) { return !(state() & BAD_MASK); }

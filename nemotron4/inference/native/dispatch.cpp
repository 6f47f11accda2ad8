// Which instruction sets the processor has, and which of the loaded kernels to take.
#include "pack.h"
#include <cstring>
#include <vector>
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

#if defined(__x86_64__)
bool may_use_amx() { // the system gives the tiles' memory on request only
#if defined(__linux__)
    const int request = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request, tile_data) == 0;
#else
    return false;
#endif
}

void cpuid(unsigned leaf, unsigned subleaf, unsigned *out) {
    asm volatile("cpuid" : "=a"(out[0]), "=b"(out[1]), "=c"(out[2]), "=d"(out[3]) : "a"(leaf), "c"(subleaf));
}

bool has_amx_bits() { // __builtin_cpu_supports of GCC 12 does not know them
    unsigned r[4];
    cpuid(7, 0, r);
    return (r[3] >> 22 & 1) && (r[3] >> 24 & 1) && (r[3] >> 25 & 1);
}
#endif

struct Set {
    const char *name;
    bool is_here;
    const Kernels *kernels; // once loaded
};

std::vector<Set> found_sets() { // the widest first
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
    const bool bf16 = vnni && __builtin_cpu_supports("avx512bf16");
    const bool amx = bf16 && has_amx_bits() && may_use_amx();
    return {{"amx", amx, nullptr}, {"bf16", bf16, nullptr}, {"vnni", vnni, nullptr}, {"avx512", avx512, nullptr}, {"avx2", avx2, nullptr}};
#else
    return {{"generic", true, nullptr}};
#endif
}

std::vector<Set> &sets() {
    static std::vector<Set> found = found_sets();
    return found;
}

// The widest set that is here and not wider than ``isa`` (null or empty: any); ``is_loaded``: of the loaded ones.
const Set *widest(const char *isa, bool is_loaded) {
    bool is_allowed = !isa || !*isa;
    for (const Set &set : sets()) {
        is_allowed = is_allowed || !strcmp(isa, set.name);
        if (is_allowed && set.is_here && (set.kernels || !is_loaded)) return &set;
    }
    return nullptr;
}

} // namespace

const Kernels *kernels_named(const char *isa) {
    const Set *set = widest(isa, true);
    return set ? set->kernels : nullptr;
}

extern "C" const char *native_isa(const char *isa) {
    const Set *set = widest(isa, false);
    return set ? set->name : "";
}

extern "C" void native_load(const char *isa, const Kernels *kernels) {
    for (Set &set : sets())
        if (!strcmp(isa, set.name)) set.kernels = kernels;
}

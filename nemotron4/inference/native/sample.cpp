// One token from the logits of a row; the rule is that of inference/sampling.py, its twin.
#include "pack.h"
#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

namespace {

struct Candidate {
    float p;
    int32_t id;
};

// The k-th largest of the values.
float kth_largest(const float *x, int size, int k) {
    std::vector<float> heap(x, x + k); // the smallest of the k largest so far is on top
    std::make_heap(heap.begin(), heap.end(), std::greater<float>());
    for (int i = k; i < size; i++)
        if (x[i] > heap.front()) {
            std::pop_heap(heap.begin(), heap.end(), std::greater<float>());
            heap.back() = x[i];
            std::push_heap(heap.begin(), heap.end(), std::greater<float>());
        }
    return heap.front();
}

// The most likely candidates, in that order, until the share before one exceeds top_p: what crosses it stays.
// Only what is above a bound is sorted; the bound falls until enough is above it. The largest weight is 1.
void take_nucleus(const Kernels *kernels, const float *weights, int size, double wanted, std::vector<int32_t> &ids,
                  std::vector<Candidate> &taken) {
    float least = 1.0f / 64;
    while (least > 1e-30f && kernels->mass(weights, size, least) <= wanted) least /= 64;
    const int count = kernels->above(weights, size, least > 1e-30f ? least : 1e-38f, ids.data());
    for (int i = 0; i < count; i++) taken.push_back({weights[ids[(size_t)i]], ids[(size_t)i]});
    std::stable_sort(taken.begin(), taken.end(), [](const Candidate &a, const Candidate &b) { return a.p > b.p; });
    double before = 0;
    size_t kept = 0;
    while (kept < taken.size() && before <= wanted) before += taken[kept++].p;
    taken.resize(kept);
}

// The first place up to which more than ``wanted`` lies; sums of 64 values at a time, then one by one.
int place_of(const float *weights, int size, double wanted) {
    double sum = 0;
    int i = 0;
    for (; i + 64 <= size; i += 64) {
        double parts[8] = {};
        for (int j = 0; j < 64; j += 8)
            for (int k = 0; k < 8; k++) parts[k] += weights[i + j + k];
        const double block = ((parts[0] + parts[1]) + (parts[2] + parts[3])) + ((parts[4] + parts[5]) + (parts[6] + parts[7]));
        if (sum + block > wanted) break;
        sum += block;
    }
    int last = 0;
    for (; i < size; i++)
        if (weights[i] > 0) {
            last = i;
            if ((sum += weights[i]) > wanted) return i;
        }
    while (last == 0 && i-- > 0)
        if (weights[i] > 0) return i;
    return last;
}

} // namespace

void draw(Draw &d) {
    static const Kernels *kernels = kernels_named(nullptr);
    if (d.temperature == 0) {
        d.token = kernels->largest(d.logits, d.size);
        return;
    }
    thread_local std::vector<float> weights;
    thread_local std::vector<int32_t> ids;
    thread_local std::vector<Candidate> all;
    weights.resize((size_t)d.size);
    ids.resize((size_t)d.size);
    const bool has_k = d.top_k > 0 && d.top_k < d.size;
    const float least = has_k ? kth_largest(d.logits, d.size, d.top_k) / d.temperature : -INFINITY;
    double total = kernels->weights(d.logits, d.size, d.temperature, least, weights.data());
    if (d.top_p >= 1 && d.min_p <= 0 && !has_k) {
        d.token = place_of(weights.data(), d.size, d.point * total);
        return;
    }
    all.clear();
    if (d.top_p < 1)
        take_nucleus(kernels, weights.data(), d.size, d.top_p * total, ids, all);
    else {
        const float bound = std::max(1e-38f, (float)d.min_p);
        const int count = kernels->above(weights.data(), d.size, bound, ids.data());
        for (int i = 0; i < count; i++) all.push_back({weights[(size_t)ids[(size_t)i]], ids[(size_t)i]});
    }
    float largest = 0;
    for (const auto &c : all) largest = std::max(largest, c.p);
    total = 0;
    size_t count = 0;
    for (const auto &c : all)
        if (d.min_p <= 0 || c.p >= d.min_p * largest) total += c.p, all[count++] = c;
    double sum = 0;
    for (size_t i = 0; i < count; i++)
        if ((sum += all[i].p) > d.point * total) {
            d.token = all[i].id;
            return;
        }
    d.token = all[count - 1].id;
}

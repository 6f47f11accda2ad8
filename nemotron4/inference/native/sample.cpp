// One token from the logits of a row; the rule is that of inference/sampling.py, its twin.
#include "pack.h"
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <vector>

namespace {

constexpr int BUCKETS = 1024, BUCKET_BITS = 20; // eight to a factor of two

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

int bucket(float p) { // of a weight between 0 and 1, by the bits of its exponent: 0 holds the largest
    int32_t bits;
    memcpy(&bits, &p, 4);
    return std::min((0x3f800000 - bits) >> BUCKET_BITS, BUCKETS - 1);
}

// The most likely candidates, in that order, until the share before one exceeds top_p: what crosses it stays.
void take_nucleus(const float *weights, int size, double total, double top_p, std::vector<Candidate> &taken) {
    double mass[BUCKETS] = {};
    for (int i = 0; i < size; i++)
        if (weights[i] > 0) mass[bucket(weights[i])] += weights[i];
    int last = 0;
    for (double before = mass[0]; last + 1 < BUCKETS && before <= top_p * total; before += mass[++last]) {
    }
    for (int i = 0; i < size; i++)
        if (weights[i] > 0 && bucket(weights[i]) <= last) taken.push_back({weights[i], i});
    std::stable_sort(taken.begin(), taken.end(), [](const Candidate &a, const Candidate &b) { return a.p > b.p; });
    double before = 0;
    size_t count = 0;
    while (count < taken.size() && before <= top_p * total) before += taken[count++].p;
    taken.resize(count);
}

} // namespace

extern "C" {

// ``point`` in [0, 1) inverts the cumulative distribution of what top-k, top-p and min-p leave.
int native_draw(const float *logits, int size, float temperature, int top_k, double top_p, double min_p, double point) {
    thread_local std::vector<float> scaled, weights;
    scaled.resize((size_t)size);
    weights.resize((size_t)size);
    for (int i = 0; i < size; i++) scaled[(size_t)i] = logits[i] / temperature;
    const float least = top_k > 0 && top_k < size ? kth_largest(scaled.data(), size, top_k) : -INFINITY;
    static const Kernels *kernels = kernels_named(nullptr);
    double total = kernels->weights(scaled.data(), size, least, weights.data());
    const bool cuts = top_p < 1 || min_p > 0 || (top_k > 0 && top_k < size);
    if (!cuts) {
        double sum = 0;
        int chosen = 0;
        for (int i = 0; i < size; i++) {
            if (weights[(size_t)i] > 0) chosen = i;
            if ((sum += weights[(size_t)i]) > point * total) break;
        }
        return chosen;
    }
    thread_local std::vector<Candidate> all;
    all.clear();
    if (top_p < 1)
        take_nucleus(weights.data(), size, total, top_p, all);
    else
        for (int i = 0; i < size; i++)
            if (weights[(size_t)i] > 0) all.push_back({weights[(size_t)i], i});
    float largest = 0;
    for (const auto &c : all) largest = std::max(largest, c.p);
    total = 0;
    size_t count = 0;
    for (const auto &c : all)
        if (min_p <= 0 || c.p >= min_p * largest) total += c.p, all[count++] = c;
    double sum = 0;
    for (size_t i = 0; i < count; i++)
        if ((sum += all[i].p) > point * total) return all[i].id;
    return all[count - 1].id;
}

} // extern "C"

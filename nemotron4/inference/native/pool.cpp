#include "pool.h"
#include <chrono>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

enum : uint8_t { WAITING, COMPUTED, DONE };
constexpr int TILE_BITS = 24;
constexpr auto SPIN = std::chrono::microseconds(100), PATIENCE = std::chrono::microseconds(100);
using Clock = std::chrono::steady_clock;

void pause() {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

} // namespace

Pool::Pool(int num_threads) : mine_((size_t)num_threads) {
    for (int i = 1; i < num_threads; i++) workers_.emplace_back([this, i] { work(i); });
}

Pool::~Pool() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        is_closing_ = true;
    }
    wake_.notify_all();
    for (auto &worker : workers_) worker.join();
}

float *Pool::scratch(int thread, size_t floats) {
    auto &mine = mine_[(size_t)thread].floats;
    if (mine.size() < floats) mine.resize(floats);
    return mine.data();
}

void Pool::wait_for_jobs_to(uint64_t number) {
    for (size_t i = 1; i < mine_.size(); i++)
        for (uint64_t inside; (inside = mine_[i].inside.load()) != 0 && inside <= number;) std::this_thread::yield();
}

Pool::Job &Pool::next_job() {
    number_++;
    Job &job = jobs_[number_ % SLOTS];
    if (number_ > SLOTS) wait_for_jobs_to(number_ - SLOTS); // one kept from running may still be in the slot
    return job;
}

void Pool::run_job(Job &job, int num_tiles, size_t scratch_floats) {
    if (job.states.size() < (size_t)num_tiles) job.states = std::vector<std::atomic<uint8_t>>((size_t)num_tiles);
    for (int i = 0; i < num_tiles; i++) job.states[(size_t)i].store(WAITING, std::memory_order_relaxed);
    job.number = number_;
    job.num_tiles = num_tiles;
    job.scratch_floats = scratch_floats;
    job.num_done.store(0, std::memory_order_relaxed);
    ticket_.store(number_ << TILE_BITS);
    if (num_asleep_.load() > 0) {
        { std::lock_guard<std::mutex> lock(mutex_); }
        wake_.notify_all();
    }
    take_part(job, number_, 0);
    for (auto since = Clock::now(); job.num_done.load(std::memory_order_acquire) < num_tiles;) {
        for (int i = 0; i < 64; i++) pause();
        if (Clock::now() - since < PATIENCE) continue;
        for (int i = 0; i < num_tiles; i++)
            if (job.states[(size_t)i].load() == WAITING) tile(job, i, 0);
        since = Clock::now();
    }
}

void Pool::take_part(Job &job, uint64_t number, int thread) {
    uint64_t ticket = ticket_.load();
    while (ticket >> TILE_BITS == number) {
        const int index = (int)(ticket & ((1u << TILE_BITS) - 1));
        if (index >= job.num_tiles) return;
        if (!ticket_.compare_exchange_weak(ticket, ticket + 1)) continue;
        tile(job, index, thread);
        ticket = ticket_.load();
    }
}

void Pool::tile(Job &job, int index, int thread) {
    float *own = scratch(thread, job.scratch_floats);
    job.compute(job.task, index, own);
    uint8_t expected = WAITING;
    if (!job.states[(size_t)index].compare_exchange_strong(expected, COMPUTED)) return;
    job.commit(job.task, index, own);
    job.num_done.fetch_add(1, std::memory_order_release);
}

void Pool::work(int thread) {
    Mine &mine = mine_[(size_t)thread];
    uint64_t seen = 0;
    auto since = Clock::now();
    while (!is_closing_.load(std::memory_order_relaxed)) {
        const uint64_t number = ticket_.load() >> TILE_BITS;
        if (number != seen) {
            mine.inside.store(number);
            if (ticket_.load() >> TILE_BITS == number) { // else the slot may be in use for another job
                take_part(jobs_[number % SLOTS], number, thread);
                seen = number;
            }
            mine.inside.store(0);
            since = Clock::now();
            continue;
        }
        for (int i = 0; i < 16; i++) pause();
        if (Clock::now() - since < SPIN) continue;
        std::unique_lock<std::mutex> lock(mutex_);
        num_asleep_++;
        wake_.wait(lock, [&] { return ticket_.load() >> TILE_BITS != seen || is_closing_; });
        num_asleep_--;
        lock.unlock();
        since = Clock::now();
    }
}

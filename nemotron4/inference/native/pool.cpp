#include "pool.h"
#include <algorithm>
#include <chrono>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

enum : uint8_t { WAITING, COMPUTED };
constexpr int TILE_BITS = 32;
constexpr auto SPIN = std::chrono::microseconds(100), PATIENCE = std::chrono::microseconds(100);
constexpr auto NAP = std::chrono::microseconds(20); // the processor is free for the thread that is waited for
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

void Pool::wait_for_programs_to(uint64_t number) {
    for (size_t i = 1; i < mine_.size(); i++)
        for (uint64_t inside; (inside = mine_[i].inside.load()) != 0 && inside <= number;) std::this_thread::yield();
}

int Pool::begin() {
    number_++;
    if (number_ > SLOTS) wait_for_programs_to(number_ - SLOTS); // one kept from running may still be in the slot
    const int slot = (int)(number_ % SLOTS);
    Program &program = programs_[(size_t)slot];
    program.num_jobs = program.num_tiles = 0;
    program.scratch_floats = 0;
    return slot;
}

Pool::Job &Pool::next_job(int num_tiles, size_t scratch_floats) {
    Program &program = programs_[number_ % SLOTS];
    if (program.jobs.size() == (size_t)program.num_jobs) program.jobs.emplace_back();
    Job &job = program.jobs[(size_t)program.num_jobs++];
    job.num_tiles = num_tiles;
    job.first_tile = program.num_tiles;
    job.num_done.store(0, std::memory_order_relaxed);
    program.num_tiles += num_tiles;
    program.scratch_floats = std::max(program.scratch_floats, scratch_floats);
    return job;
}

void Pool::run() {
    Program &program = programs_[number_ % SLOTS];
    const size_t num_tiles = (size_t)program.num_tiles;
    if (program.states.size() < num_tiles) program.states = std::vector<std::atomic<uint8_t>>(num_tiles);
    for (size_t i = 0; i < num_tiles; i++) program.states[i].store(WAITING, std::memory_order_relaxed);
    program.ticket.store(0);
    running_.store(number_);
    if (num_asleep_.load() > 0) {
        { std::lock_guard<std::mutex> lock(mutex_); }
        wake_.notify_all();
    }
    take_part(program, 0);
}

void Pool::take_part(Program &program, int thread) {
    float *own = scratch(thread, program.scratch_floats);
    for (;;) {
        uint64_t ticket = program.ticket.load();
        const int job = (int)(ticket >> TILE_BITS), index = (int)(uint32_t)ticket;
        if (job == program.num_jobs) return;
        if (index >= program.jobs[(size_t)job].num_tiles)
            wait_for(program, job, own);
        else if (program.ticket.compare_exchange_weak(ticket, ticket + 1))
            tile(program, job, index, own);
    }
}

// Until the job, whose tiles are all drawn, is complete.
void Pool::wait_for(Program &program, int job, float *scratch) {
    const Job &waited = program.jobs[(size_t)job];
    const auto is_open = [&] { return (int)(program.ticket.load(std::memory_order_relaxed) >> TILE_BITS) == job; };
    for (auto since = Clock::now(); is_open();) {
        for (int i = 0; i < 64 && is_open(); i++) pause();
        if (Clock::now() - since < PATIENCE) continue;
        bool is_helped = false;
        for (int i = 0; i < waited.num_tiles && is_open(); i++)
            if (program.states[(size_t)(waited.first_tile + i)].load() == WAITING) {
                tile(program, job, i, scratch);
                is_helped = true;
            }
        if (!is_helped) std::this_thread::sleep_for(NAP);
        since = Clock::now();
    }
}

void Pool::tile(Program &program, int job, int index, float *scratch) {
    Job &its = program.jobs[(size_t)job];
    its.compute(its.task, index, scratch);
    uint8_t expected = WAITING;
    if (!program.states[(size_t)(its.first_tile + index)].compare_exchange_strong(expected, COMPUTED)) return;
    its.commit(its.task, index, scratch);
    if (its.num_done.fetch_add(1) + 1 == its.num_tiles) program.ticket.store((uint64_t)(job + 1) << TILE_BITS);
}

void Pool::work(int thread) {
    Mine &mine = mine_[(size_t)thread];
    uint64_t seen = 0;
    auto since = Clock::now();
    while (!is_closing_.load(std::memory_order_relaxed)) {
        const uint64_t number = running_.load();
        if (number != seen) {
            mine.inside.store(number);
            if (running_.load() == number) { // else the slot may be in use for another program
                take_part(programs_[number % SLOTS], thread);
                seen = number;
            }
            mine.inside.store(0);
            since = Clock::now();
            continue;
        }
        for (int i = 0; i < 16 && running_.load(std::memory_order_relaxed) == seen; i++) pause();
        if (Clock::now() - since < SPIN) continue;
        std::unique_lock<std::mutex> lock(mutex_);
        num_asleep_++;
        wake_.wait(lock, [&] { return running_.load() != seen || is_closing_; });
        num_asleep_--;
        lock.unlock();
        since = Clock::now();
    }
}

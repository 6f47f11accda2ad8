// Threads that share the tiles of one job after another.
//
// A tile is computed into memory of the thread's own and then committed. The threads draw tiles from one counter,
// so a thread that another program keeps from running costs its share and no more: a tile that it holds for long
// is computed again by the thread that waits, and of both results the first is committed, the other dropped.
// Waiting threads spin for a moment, then sleep.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

class Pool {
  public:
    explicit Pool(int num_threads);
    ~Pool();
    int size() const { return (int)workers_.size() + 1; }

    // ``task.compute(tile, scratch)`` may run twice for a tile, at any time until the slot is used again: it reads
    // what outlives the job, and writes scratch only. ``task.commit(tile, scratch)`` runs once.
    template <class Task> void run(int num_tiles, size_t scratch_floats, const Task &task) {
        static_assert(std::is_trivially_copyable<Task>::value && sizeof(Task) <= sizeof(Job::task), "plain data");
        if (num_tiles == 0) return;
        scratch(0, scratch_floats);
        if (num_tiles == 1 || workers_.empty()) {
            for (int tile = 0; tile < num_tiles; tile++) {
                task.compute(tile, mine_[0].floats.data());
                task.commit(tile, mine_[0].floats.data());
            }
            return;
        }
        Job &job = next_job();
        memcpy(job.task, &task, sizeof(Task));
        job.compute = [](const void *t, int tile, float *s) { static_cast<const Task *>(t)->compute(tile, s); };
        job.commit = [](const void *t, int tile, float *s) { static_cast<const Task *>(t)->commit(tile, s); };
        run_job(job, num_tiles, scratch_floats);
    }

    uint64_t last_job() const { return number_; }
    // Until no thread is inside a job up to this one: what it reads may change or be freed then.
    void wait_for_jobs_to(uint64_t number);
    void wait_for_stragglers() { wait_for_jobs_to(number_); }

  private:
    enum { SLOTS = 256 };
    struct Job {
        alignas(16) char task[320];
        void (*compute)(const void *, int, float *);
        void (*commit)(const void *, int, float *);
        uint64_t number = 0;
        int num_tiles = 0;
        size_t scratch_floats = 0;
        std::atomic<int> num_done{0};
        std::vector<std::atomic<uint8_t>> states{std::vector<std::atomic<uint8_t>>(64)};
    };
    struct alignas(64) Mine { // of one thread
        std::atomic<uint64_t> inside{0}; // number of the job that the thread may be in
        std::vector<float> floats;
    };

    Job &next_job();
    void run_job(Job &job, int num_tiles, size_t scratch_floats);
    void take_part(Job &job, uint64_t number, int thread);
    void tile(Job &job, int index, int thread);
    void work(int thread);
    float *scratch(int thread, size_t floats);

    std::vector<Job> jobs_{std::vector<Job>(SLOTS)};
    std::vector<Mine> mine_;
    std::vector<std::thread> workers_;
    alignas(64) std::atomic<uint64_t> ticket_{0}; // number of the job << 24 | next tile
    alignas(64) std::atomic<int> num_asleep_{0};
    std::atomic<bool> is_closing_{false};
    std::mutex mutex_;
    std::condition_variable wake_;
    uint64_t number_ = 0;
};

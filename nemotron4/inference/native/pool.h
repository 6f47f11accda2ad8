// Threads that share the tiles of one job after another.
//
// The jobs of a program are known before it runs, and no thread leads: whoever completes a job opens the next one.
// A tile is computed into memory of the thread's own and then committed. The threads draw tiles from one counter,
// so a thread that another program keeps from running, the caller too, costs its share and no more: a tile that it
// holds for long is computed again by a thread that waits, and of both results the first is committed, the other
// dropped. Waiting threads spin for a moment, then sleep.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <deque>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

class Pool {
  public:
    enum { SLOTS = 8 };

    explicit Pool(int num_threads);
    ~Pool();

    int num_threads() const { return (int)mine_.size(); }

    // Begins a program, in the slot that it returns: no thread reads what the slot's last program read any more.
    int begin();

    // ``task.compute(tile, scratch)`` may run twice for a tile, at any time until the slot is used again: it reads
    // what outlives the program, and writes scratch only. ``task.commit(tile, scratch)`` runs once, when all jobs
    // added before are complete.
    template <class Task> void add(int num_tiles, size_t scratch_floats, const Task &task) {
        static_assert(std::is_trivially_copyable<Task>::value && sizeof(Task) <= sizeof(Job::task), "plain data");
        if (num_tiles == 0) return;
        Job &job = next_job(num_tiles, scratch_floats);
        memcpy(job.task, &task, sizeof(Task));
        job.compute = [](const void *t, int tile, float *s) { static_cast<const Task *>(t)->compute(tile, s); };
        job.commit = [](const void *t, int tile, float *s) { static_cast<const Task *>(t)->commit(tile, s); };
    }

    void run(); // what was added, to its end

    // Until no thread is inside a program: what they read may change or be freed then.
    void wait_for_stragglers() { wait_for_programs_to(number_); }

  private:
    struct Job {
        alignas(16) char task[320];
        void (*compute)(const void *, int, float *);
        void (*commit)(const void *, int, float *);
        int num_tiles, first_tile; // first_tile: among those of the program
        std::atomic<int> num_done;
    };
    struct Program {
        std::deque<Job> jobs;
        int num_jobs = 0, num_tiles = 0;
        size_t scratch_floats = 0;
        std::vector<std::atomic<uint8_t>> states; // of the tiles
        alignas(64) std::atomic<uint64_t> ticket{0}; // job << 32 | next tile
    };
    struct alignas(64) Mine { // of one thread
        std::atomic<uint64_t> inside{0}; // number of the program that the thread may be in
        std::vector<float> floats;
    };

    Job &next_job(int num_tiles, size_t scratch_floats);
    void wait_for_programs_to(uint64_t number);
    void take_part(Program &program, int thread);
    void wait_for(Program &program, int job, float *scratch);
    static void tile(Program &program, int job, int index, float *scratch);
    void work(int thread);
    float *scratch(int thread, size_t floats);

    std::vector<Program> programs_{std::vector<Program>(SLOTS)};
    std::vector<Mine> mine_;
    std::vector<std::thread> workers_;
    alignas(64) std::atomic<uint64_t> running_{0}; // number of the program that runs, or ran last
    alignas(64) std::atomic<int> num_asleep_{0};
    std::atomic<bool> is_closing_{false};
    std::mutex mutex_;
    std::condition_variable wake_;
    uint64_t number_ = 0;
};

// Work on items one after the other, each in several parts: while one item is in its last part, the
// next is in the part before, and so on. All their tasks are shared out together, so that threads
// wait for each other once an item instead of once a part.
#pragma once
#include <vector>

#include "threads.h"

struct Pipeline {
    // A part may have no tasks. It may read what earlier parts made of this item, and write what no
    // part reads of the item before or after: two buffers, taken in turns, do.
    virtual int64_t tasks(int part, int64_t item) const = 0;
    virtual void run(int part, int64_t item, int64_t task) const = 0;

  protected:
    ~Pipeline() = default;
};

inline void run_pipeline(const Pipeline &work, int parts, int64_t items, int64_t bytes) {
    struct Moment {
        const Pipeline &work;
        int64_t items, now;
        int parts;

        int64_t tasks_of(int part) const {
            const int64_t item = now - part;
            return item >= 0 && item < items ? work.tasks(part, item) : 0;
        }
        int64_t tasks() const {
            int64_t sum = 0;
            for (int part = 0; part < parts; part++) sum += tasks_of(part);
            return sum;
        }
        void operator()(int64_t task) const {
            for (int part = 0; part < parts; part++) {
                const int64_t own = tasks_of(part);
                if (task < own) return work.run(part, now - part, task);
                task -= own;
            }
        }
    };
    std::vector<Moment> moments;
    std::vector<Stage> stages;
    for (int64_t now = 0; now < items + parts - 1; now++)
        moments.push_back({work, items, now, parts});
    for (Moment &moment : moments) stages.push_back(stage_of(moment.tasks(), moment));
    run_stages(stages.data(), static_cast<int>(stages.size()), bytes);
}

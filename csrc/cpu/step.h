// One step of a group: this rank publishes a header and data, and goes on when every peer has done
// so.
#pragma once

#include <string>
#include <vector>

#include "group.h"
#include "moriep/layout.h"

namespace moriep {

class Step {
 public:
  // Begins the next step of a rank; the step's number is one more than what its control page shows.
  Step(LocalRank& me, Kind kind, const Shape& shape, int32_t dtype, bool with_scalars,
       int32_t order, const std::string& config);

  // Gives every rank's half of this step, at least `bytes` long, unless the group has failed. Only
  // then may this rank write anything: a step that failed has ended before its peers did, who may
  // still read the step before it.
  Status halves(int64_t bytes, std::vector<std::byte*>* out);

  // Publishes this rank's data and waits until every peer has published; compares the headers.
  Status publish_and_wait();

  // Records a failure where peers see it, and gives it back with rank, step and what was running.
  Status fail(const Status& why);

 private:
  Status wait_for(int32_t peer, Clock::time_point deadline);
  // Says why a rank will not publish this step, if that is certain; looking at its process costs a
  // file read.
  Status look_at(int32_t peer, bool at_process);
  Status compare_with(int32_t peer);

  LocalRank& me_;
  const Kind kind_;
  const uint32_t step_;
  StepHeader header_;
  std::vector<Arena*> arenas_;
};

}  // namespace moriep

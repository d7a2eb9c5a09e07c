#include "scheduler.h"

#include <algorithm>
#include <chrono>
#include <random>
#include <sstream>
#include <thread>

#include "dispatch.h"

namespace gfx942 {
namespace {

void open_barrier(Workgroup& group) {
  group.waiting_waves = 0;
  ++group.barriers;
}

using Clock = std::chrono::steady_clock;

// An MI300X has 304 compute units; kernels that wait for each other may rely on one workgroup on
// each.
constexpr uint64_t kResidentWorkgroups = 304;
constexpr uint64_t kResidentRegisterBytes = uint64_t{2} << 30;

struct Resident {
  std::unique_ptr<Workgroup> group;
  std::vector<std::unique_ptr<Wave>> waves;
};

class Scheduler {
 public:
  explicit Scheduler(Dispatch& dispatch)
      : dispatch_(dispatch), random_(static_cast<uint32_t>(dispatch.options.seed)) {}

  std::optional<Fault> run();

 private:
  void fill();
  // Whether the wave did more than to wait.
  bool take_turn(Wave& wave);
  void end_wave(Wave& wave);
  std::optional<Fault> check_deadline();
  std::string where(const Wave& wave, uint64_t pc) const;
  Fault fault_of(const FaultError& error, const Wave& wave) const;

  Dispatch& dispatch_;
  std::minstd_rand random_;
  uint64_t next_workgroup_ = 0;
  std::vector<Resident> resident_;
  uint64_t current_pc_ = 0;
  Clock::time_point last_end_ = Clock::now();
};

std::string coordinates(const Dim3& d) {
  return std::to_string(d.x) + "," + std::to_string(d.y) + "," + std::to_string(d.z);
}

std::string Scheduler::where(const Wave& wave, uint64_t pc) const {
  std::string text = "workgroup " + coordinates(wave.group->id) + " wave " +
                     std::to_string(wave.index) + " at pc " + hex(pc) + " (entry+" +
                     hex(pc - dispatch_.descriptor.entry) + ")";
  const Instruction* at = dispatch_.code->contains(pc) ? dispatch_.code->at(pc) : nullptr;
  return at != nullptr ? text + " `" + at->text + "`" : text;
}

Fault Scheduler::fault_of(const FaultError& error, const Wave& wave) const {
  return {error.code,
          dispatch_.launch.kernel.name + ": " + where(wave, current_pc_) + " " + error.what()};
}

void Scheduler::fill() {
  const uint32_t waves = dispatch_.waves_per_workgroup();
  const uint64_t group_bytes =
      uint64_t{waves} * sizeof(Lanes) *
      (dispatch_.descriptor.num_vectors + dispatch_.descriptor.num_accumulators);
  const uint64_t limit = std::max<uint64_t>(
      1,
      std::min(kResidentWorkgroups, kResidentRegisterBytes / std::max<uint64_t>(1, group_bytes)));
  std::erase_if(resident_, [](const Resident& r) { return r.group->live_waves == 0; });
  while (resident_.size() < limit && next_workgroup_ < dispatch_.num_workgroups()) {
    Resident started;
    const auto slot = static_cast<uint32_t>(next_workgroup_ % limit);
    started.group = dispatch_.start_workgroup(next_workgroup_++, slot);
    for (uint32_t index = 0; index < waves; ++index) {
      started.waves.push_back(dispatch_.start_wave(*started.group, index));
    }
    resident_.push_back(std::move(started));
  }
}

bool Scheduler::take_turn(Wave& wave) {
  if (wave.state == WaveState::kAtBarrier && wave.barriers_before == wave.group->barriers) {
    return false;
  }
  wave.state = WaveState::kRunning;
  const uint32_t longest = dispatch_.options.longest_turn;
  const uint32_t shortest = std::max(1U, longest / 16);
  uint32_t left = shortest + random_() % (longest - shortest + 1);
  Code& code = *dispatch_.code;
  Counts* const counts = dispatch_.counts;
  // A load with a scope that repeats is most likely a wait for another wave.
  uint64_t scoped_load = 0;
  while (wave.state == WaveState::kRunning && left-- != 0) {
    current_pc_ = wave.pc;
    if (!code.contains(wave.pc)) {
      throw FaultError(FaultCode::kIllegalInstruction, "is outside the kernel's code");
    }
    const Instruction* current = code.at(wave.pc);
    if (current == nullptr) {
      throw FaultError(FaultCode::kIllegalInstruction, "is no instruction");
    }
    if (current->handler == nullptr) {
      throw FaultError(FaultCode::kIllegalInstruction, "is not implemented");
    }
    if (current->sc1) {
      if (scoped_load == wave.pc) {
        wave.state = WaveState::kYielding;
        break;
      }
      scoped_load = wave.pc;
    }
    wave.pc += current->bytes;
    if (counts != nullptr) ++counts->instructions[static_cast<size_t>(current->kind)];
    if (current->is_vector && wave.has_vector_mode()) {
      execute_in_vector_mode(wave, *current);
    } else {
      current->handler(wave, *current);
    }
  }
  if (wave.state == WaveState::kEnded) end_wave(wave);
  return wave.state != WaveState::kYielding;
}

void Scheduler::end_wave(Wave& wave) {
  Workgroup& group = *wave.group;
  --group.live_waves;
  last_end_ = Clock::now();
  if (group.waiting_waves == 0) return;
  if (dispatch_.options.check_barriers) {
    throw FaultError(FaultCode::kBarrier,
                     "ends while other waves of its workgroup wait at the barrier at pc " +
                         hex(group.barrier_pc));
  }
  // A barrier waits for the surviving waves only, and this one may have been the last to come.
  if (group.waiting_waves == group.live_waves) open_barrier(group);
}

std::optional<Fault> Scheduler::check_deadline() {
  const std::chrono::duration<double> waited = Clock::now() - last_end_;
  if (waited.count() < dispatch_.options.deadline_seconds) return std::nullopt;
  std::ostringstream seconds;
  seconds << dispatch_.options.deadline_seconds;
  std::string text = dispatch_.launch.kernel.name + ": no wave has ended for " + seconds.str() +
                     " s; still there:";
  int listed = 0;
  for (const Resident& resident : resident_) {
    for (const auto& wave : resident.waves) {
      if (wave->state == WaveState::kEnded || ++listed > 4) continue;
      text += " " + where(*wave, wave->pc) +
              (wave->state == WaveState::kAtBarrier ? " (at a barrier);" : ";");
    }
  }
  return Fault{FaultCode::kDeadline, text};
}

std::optional<Fault> Scheduler::run() {
  int idle_rounds = 0;
  for (fill(); !resident_.empty(); fill()) {
    bool busy = false;
    // No workgroup may rely on another one being ahead.
    std::shuffle(resident_.begin(), resident_.end(), random_);
    for (Resident& resident : resident_) {
      for (const auto& wave : resident.waves) {
        if (wave->state == WaveState::kEnded) continue;
        try {
          busy |= take_turn(*wave);
        } catch (const FaultError& error) {
          return fault_of(error, *wave);
        }
      }
    }
    if (auto fault = check_deadline()) return fault;
    idle_rounds = busy ? 0 : idle_rounds + 1;
    // What all waves wait for comes from another launch or process.
    if (idle_rounds > 16) {
      std::this_thread::sleep_for(std::chrono::microseconds(50));
    } else if (idle_rounds > 0) {
      std::this_thread::yield();
    }
  }
  return std::nullopt;
}

}  // namespace

void arrive_at_barrier(Wave& wave, const Instruction& i) {
  Workgroup& group = *wave.group;
  const bool check = group.dispatch->options.check_barriers;
  if (check && group.live_waves != group.waves) {
    throw FaultError(FaultCode::kBarrier,
                     "waits at a barrier after another wave of its workgroup has ended");
  }
  if (check && group.waiting_waves != 0 && group.barrier_pc != i.pc) {
    throw FaultError(FaultCode::kBarrier,
                     "waits at a barrier while others of its workgroup wait at the one at pc " +
                         hex(group.barrier_pc));
  }
  group.barrier_pc = i.pc;
  if (++group.waiting_waves < group.live_waves) {
    wave.state = WaveState::kAtBarrier;
    wave.barriers_before = group.barriers;
    return;
  }
  open_barrier(group);
}

std::optional<Fault> run(const Launch& launch, const AddressSpace& memory, const Options& options,
                         Counts* counts) {
  const Dim3& size = launch.workgroup_size;
  const uint64_t threads = uint64_t{size.x} * size.y * size.z;
  const Dim3& count = launch.num_workgroups;
  const auto invalid = [&](const std::string& why) {
    return Fault{FaultCode::kInvalidLaunch, launch.kernel.name + ": " + why};
  };
  if (threads == 0 || threads > 1024 || size.x > 1024 || size.y > 1024 || size.z > 1024) {
    return invalid("a workgroup of " + coordinates(size) +
                   " work-items must have 1 to 1024 in all");
  }
  if (count.x == 0 || count.y == 0 || count.z == 0) {
    return invalid("a grid of " + coordinates(count) + " workgroups must not be empty");
  }
  if (launch.lds_bytes > 65536) {
    return invalid(std::to_string(launch.lds_bytes) + " bytes of LDS must be at most 65536");
  }
  try {
    Dispatch dispatch(launch, memory, options, counts);
    std::optional<Fault> fault = Scheduler(dispatch).run();
    if (Caches* caches = dispatch.memory.caches()) caches->write_back_all();
    return fault;
  } catch (const FaultError& error) {
    return Fault{error.code, launch.kernel.name + ": " + error.what()};
  }
}

}  // namespace gfx942

// Where in its group a device is that runs a handler.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "moriep/registry.h"
#include "moriep/status.h"

namespace moriep {

// A rank of this process, held together with its group for as long as a step runs.
template <typename Group>
struct PlaceOf {
  std::shared_ptr<Group> group;
  int32_t rank = -1;
  int32_t index = 0;       // of the group among those of its table
  int32_t first_rank = 0;  // of the group, as the program counts: not 0 where nodes lie before it
  std::string node;        // what errors begin with where the group is one node of several
};

template <typename Group>
Status find_place(std::string_view name, int32_t device, PlaceOf<Group>* place) {
  const std::string group(name);
  const auto table = RegistryOf<Group>::get().find(group);
  if (table == nullptr) {
    return Status(Code::kFailedPrecondition,
                  "group " + group +
                      " is not open in this process; call jm.initialize(mesh, ep_axis) "
                      "before running a deserialised executable");
  }
  const auto found = table->place_of_device.find(device);
  if (found == table->place_of_device.end()) {
    return Status(Code::kFailedPrecondition,
                  "device " + std::to_string(device) + " has no place in group " + group +
                      "; before the program is traced, set the mesh with jax.set_mesh or open it "
                      "with jm.initialize(mesh, ep_axis)");
  }
  place->group = table->groups[static_cast<size_t>(found->second.first)];
  place->rank = found->second.second;
  place->index = found->second.first;
  return Status();
}

// Where a table's groups are so many nodes each, in their order: which one the place's group is.
template <typename Group>
void find_node(int64_t num_nodes, PlaceOf<Group>* place) {
  if (num_nodes < 2) return;
  const auto node = static_cast<int32_t>(place->index % num_nodes);
  place->first_rank = node * place->group->num_ranks();
  place->node = "node " + std::to_string(node) + " (ranks " + std::to_string(place->first_rank) +
                " to " + std::to_string(place->first_rank + place->group->num_ranks() - 1) +
                ", here counted from 0), ";
}

// What is said where the program computes another rank than the group's table has.
inline Status wrong_rank(std::string_view group, int32_t device, int32_t rank) {
  return Status(Code::kFailedPrecondition,
                "device " + std::to_string(device) + " is rank " + std::to_string(rank) +
                    " of the running mesh, which is not its place in group " + std::string(group) +
                    "; before the program is traced, set the mesh with jax.set_mesh or open it "
                    "with jm.initialize(mesh, ep_axis)");
}

}  // namespace moriep

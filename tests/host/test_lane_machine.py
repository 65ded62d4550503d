"""Nothing is lost, whatever the order: random operations against a plain model of who is where."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from host.lane_rig import HOST_PAGE, MAX_LANES, NUM_LAYERS, PAGES_PER_LANE, Rig
from omniserve.policy.lanes import WaitingLane, take


class LaneMachine(RuleBasedStateMachine):
    """Random exits, services, takes, cancels, walks and resets against a plain model of who is where."""

    slots = st.integers(0, MAX_LANES - 1)
    layers = st.integers(0, NUM_LAYERS - 1)

    @initialize()
    def start(self) -> None:
        self.rig = Rig()
        self.idle: dict[int, int] = {}  # slot -> next layer
        self.waiting: list[tuple[int, int, int]] = []  # (slot, layer, iteration), oldest first
        self.served: set[int] = set()
        self.draining: list[int] = []
        self.free = set(range(MAX_LANES))
        self.iteration, self.in_walk = 0, False

    @precondition(lambda self: self.free)
    @rule(data=st.data())
    def new_owner(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.free)))
        self.free.remove(slot)
        self.rig.open_lane(slot)
        self.rig.start_token(slot)
        self.idle[slot] = 0

    @precondition(lambda self: self.idle)
    @rule(data=st.data())
    def exit_rows(self, data: st.DataObject) -> None:
        layer = data.draw(st.sampled_from(sorted(set(self.idle.values()))))
        here = [slot for slot in sorted(self.idle) if self.idle[slot] == layer]
        for slot in here:
            del self.idle[slot]
            self.waiting.append((slot, layer, self.iteration))
        self.rig.exit(layer, *here)

    @rule(slot=slots)
    def serve(self, slot: int) -> None:
        is_waiting = any(slot == entry[0] for entry in self.waiting) and slot not in self.served
        is_draining = slot in self.draining and slot not in self.served
        assert self.rig.host.serve(slot) == (is_waiting or is_draining)
        if is_waiting or is_draining:
            self.served.add(slot)

    @rule(layer=layers, cap=st.integers(0, MAX_LANES), same_iteration=st.booleans())
    def take(self, layer: int, cap: int, same_iteration: bool) -> None:
        """The native rule is the policy's own; outside walks no row is too young."""
        here = [entry for entry in self.waiting if entry[1] == layer]
        lanes = [WaitingLane(slot, born, slot in self.served) for slot, _, born in here]
        now = self.iteration if self.in_walk else self.iteration + 1
        entering = take(lanes, cap, now, same_iteration)
        assert self.rig.take(layer, cap, same_iteration) == entering
        self.waiting = [entry for entry in self.waiting if entry[0] not in entering]
        for slot in entering:
            self.served.remove(slot)
            self.advance(slot, layer)

    def advance(self, slot: int, layer: int) -> None:
        self.idle[slot] = (layer + 1) % NUM_LAYERS
        if layer < NUM_LAYERS - 1:
            return
        if self.rig.position[slot] + 1 < HOST_PAGE * PAGES_PER_LANE:
            self.rig.start_token(slot)
        else:
            del self.idle[slot]
            self.free.add(slot)

    @rule(slot=slots)
    def cancel(self, slot: int) -> None:
        entry = next((entry for entry in self.waiting if entry[0] == slot), None)
        in_flight = slot in self.draining or (entry is not None and slot not in self.served)
        assert self.rig.port.cancel(slot) == (not in_flight)
        if entry:
            self.waiting.remove(entry)
            self.rig.expected.pop(slot)
        self.idle.pop(slot, None)
        if not in_flight:
            self.served.discard(slot)
            self.free.add(slot)
        elif slot not in self.draining:
            self.draining.append(slot)

    @rule()
    def drain(self) -> None:
        done = [slot for slot in self.draining if slot in self.served]
        assert self.rig.port.drained() == done
        for slot in done:
            self.draining.remove(slot)
            self.served.remove(slot)
            self.free.add(slot)

    @rule(begin=st.booleans())
    def walk(self, begin: bool) -> None:
        if begin:
            self.rig.port.begin_walk()
        else:
            self.rig.port.end_walk()
        self.in_walk = begin
        self.iteration += 1

    @invariant()
    def the_port_agrees(self) -> None:
        if not hasattr(self, "rig"):
            return
        ready, waiting, _ = self.rig.scan()
        layers = [layer for _, layer, _ in self.waiting]
        assert waiting == [layers.count(layer) for layer in range(NUM_LAYERS)]
        layers = [layer for slot, layer, _ in self.waiting if slot in self.served]
        assert ready == [layers.count(layer) for layer in range(NUM_LAYERS)]
        unserved = [s for s, _, _ in self.waiting if s not in self.served]
        unserved += [s for s in self.draining if s not in self.served]
        assert sorted(slot for _, slot in self.rig.host.pending()) == sorted(unserved)


TestLaneMachine = LaneMachine.TestCase
TestLaneMachine.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)

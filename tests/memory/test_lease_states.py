"""Leases as a state machine: a page is written while its lease lives, and never after; each lease ends exactly once."""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from memory.layout import KVLayout
from memory.leases import LeaseError, LeaseTable
from memory.pages import PagePool

LAYOUT = KVLayout(2, 1, 4, 4, "float32", "hnd")
NUM_PAGES = 16


class LeaseStates(RuleBasedStateMachine):
    """Grants, senders that open, claim, settle and commit in any order, failures, expiries and revocations."""

    @initialize(ttl_s=st.sampled_from((0.0, 60.0)))
    def make(self, ttl_s):
        self.ended = {}
        self.pool = PagePool(LAYOUT, NUM_PAGES)
        self.table = LeaseTable(
            "tcp",
            "nowhere:1",
            pool=self.pool,
            ttl_s=ttl_s,
            on_commit=lambda request_id, _: self._end(request_id, "committed"),
            on_failed=lambda request_id, _: self._end(request_id, "failed"),
        )
        self.leases, self.sessions, self.told, self.revoked = {}, {}, {}, set()
        self.number = 0

    def _end(self, request_id, how):
        assert request_id not in self.ended, "it ended before"
        assert request_id not in self.revoked, "nothing is called after revoke"
        self.ended[request_id] = how

    @rule(num_pages=st.integers(1, 4), num_senders=st.integers(1, 3))
    def grant(self, num_pages, num_senders):
        self.number += 1
        request_id = f"r{self.number}"
        grant = self.table.grant(
            request_id, range(num_pages), page_idxs=range(num_pages), num_tokens=4, num_senders=num_senders
        )
        lease = next(each for each in self.table.all() if each.grant is grant)
        self.leases[request_id] = lease
        self.sessions[request_id] = []

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def open(self, data):
        request_id = data.draw(st.sampled_from(sorted(self.leases)))
        lease = self.leases[request_id]
        was_live, count = lease.live, len(lease.sessions)
        session = lease.open(key=b"k", on_end=lambda session, _: self.told.setdefault(id(session), []).append(1))
        assert (session is not None) == (was_live and count < lease.grant.num_senders)
        if session is not None:
            self.sessions[request_id].append(session)

    @precondition(lambda self: any(self.sessions.values()))
    @rule(data=st.data(), layer=st.integers(0, 2), first=st.integers(0, 4), count=st.integers(0, 4))
    def write(self, data, layer, first, count):
        """As a peer does it: claim, write while the session's lock is held and the lease lives, settle."""
        request_id = data.draw(st.sampled_from(sorted(name for name, each in self.sessions.items() if each)))
        session = data.draw(st.sampled_from(self.sessions[request_id]))
        lease = session.lease
        num_pages = len(lease.grant.pages)
        is_allowed = layer < 2 and count and first + count <= num_pages
        before = lease.num_missing
        try:
            pages = lease.claim(layer, first, count)
        except LeaseError as error:
            reason = str(error)
            self.table.fail(lease, reason)
            is_again = "sent before" in reason
        else:
            reason, is_again = "", False
        if reason:
            assert is_again or not is_allowed
            return
        assert is_allowed and pages == lease.grant.pages[first : first + count]
        with session.lock:
            if not lease.live:
                return
        with lease.lock:
            lease.settle(layer, first, count)
        assert lease.num_missing == before - count

    @precondition(lambda self: any(self.sessions.values()))
    @rule(data=st.data())
    def commit(self, data):
        request_id = data.draw(st.sampled_from(sorted(name for name, each in self.sessions.items() if each)))
        session = data.draw(st.sampled_from(self.sessions[request_id]))
        lease, was_live = session.lease, session.lease.live
        is_last = lease.num_committed + 1 == lease.grant.num_senders and not session.has_committed
        is_whole = lease.num_missing == 0
        try:
            self.table.commit(session, b"")
        except LeaseError as error:
            self.table.fail(lease, str(error))
            is_refused = True
        else:
            is_refused = False
        assert was_live or not is_refused
        if is_refused:
            return
        if was_live and is_last:
            assert is_whole and self.ended[request_id] == "committed"

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), how=st.sampled_from(("revoke", "fail", "expire")))
    def end(self, data, how):
        request_id = data.draw(st.sampled_from(sorted(self.leases)))
        lease = self.leases[request_id]
        if how == "revoke":
            self.table.revoke(request_id)
            if request_id not in self.ended:
                self.revoked.add(request_id)
            assert not lease.live
        elif how == "fail":
            self.table.fail(lease, "a test")
            assert not lease.live
        else:
            self.table.expire(lease)

    @invariant()
    def who_has_ended_is_over(self):
        for request_id, lease in getattr(self, "leases", {}).items():
            is_over = request_id in self.ended or request_id in self.revoked
            assert lease.live == (not is_over)
            assert (self.table.find(lease.grant.lease_id) is None) or lease.live
            for session in self.sessions[request_id]:
                assert len(self.told.get(id(session), [])) == int(not lease.live)
        if hasattr(self, "table"):
            assert sum(lease.live for lease in self.leases.values()) == sum(each.live for each in self.table.all())


LeaseStates.TestCase.settings = settings(
    max_examples=80, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestLeaseStates = LeaseStates.TestCase

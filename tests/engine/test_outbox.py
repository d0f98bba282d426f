"""When the engine's news leave: at once where a token is waited for, else together, and nothing is ever lost."""

from hypothesis import given
from hypothesis import strategies as st

from vashista.engine.messages import EngineStats, FinishReason, SamplingParams, StepReport, Submit, TokenEvent
from vashista.engine.outbox import HOLD_S, Outbox

STATS = EngineStats()


class Sent:
    """An outbox, what it sent and when, and its clock."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.reports: list[tuple[float, StepReport]] = []
        self.box = Outbox(lambda report: self.reports.append((self.now_s, report)), lambda: self.now_s)

    def expect(self, name: str, *, is_streaming: bool) -> None:
        sampling = SamplingParams(seed=0, max_tokens=9)
        self.box.expect(Submit(name, [1], sampling, 0.0, is_streaming=is_streaming))

    def step(self, *events: TokenEvent, after_s: float = 0.01, shares: dict[str, float] | None = None) -> None:
        self.now_s += after_s
        self.box.put(list(events), STATS, shares)

    def tokens(self) -> list[list[int]]:
        return [[token for event in report.events for token in event.token_ids] for _, report in self.reports]


def first(name: str) -> TokenEvent:
    return TokenEvent(name, token_ids=[0], scheduled_s=1.0)


def last(name: str) -> TokenEvent:
    return TokenEvent(name, token_ids=[99], finish_reason=FinishReason.LENGTH)


def test_each_token_of_a_stream_leaves_at_once() -> None:
    sent = Sent()
    sent.expect("a", is_streaming=True)
    for event in (first("a"), TokenEvent("a", token_ids=[1]), last("a")):
        sent.step(event)
    assert sent.tokens() == [[0], [1], [99]]
    assert all(event.age_s == 0 for _, report in sent.reports for event in report.events)


def test_only_the_first_and_the_last_token_of_a_whole_reply_leave_at_once() -> None:
    sent = Sent()
    sent.expect("a", is_streaming=False)
    sent.step(first("a"), shares={"a": 1.0})
    for token in (1, 2, 3):
        sent.step(TokenEvent("a", token_ids=[token]), shares={"a": 0.5})
    sent.step(last("a"), shares={"a": 0.25})
    assert sent.tokens() == [[0], [1, 2, 3, 99]]
    _, report = sent.reports[-1]
    assert [round(event.age_s, 6) for event in report.events] == [0.03, 0.02, 0.01, 0.0]
    assert report.shares == {"a": 1.75}


def test_what_is_held_leaves_after_a_while_and_with_anything_else() -> None:
    sent = Sent()
    for name in ("a", "b"):
        sent.expect(name, is_streaming=name == "b")
        sent.step(first(name))
    sent.step(TokenEvent("a", token_ids=[1]))
    sent.step(TokenEvent("a", token_ids=[2]), TokenEvent("b", token_ids=[3]))
    assert sent.tokens()[2:] == [[1, 2, 3]]
    sent.step(TokenEvent("a", token_ids=[4]))
    sent.step(TokenEvent("a", token_ids=[5]), after_s=2 * HOLD_S)
    assert sent.tokens()[3:] == [[4, 5]]
    sent.step(TokenEvent("a", token_ids=[6]))
    sent.step()
    assert sent.tokens()[4:] == [[6]]
    sent.step()
    assert sent.tokens()[5:] == [[]], "a sign of life leaves at once"


def test_a_name_that_is_used_again_is_not_taken_for_the_old_request() -> None:
    sent = Sent()
    sent.expect("a", is_streaming=False)
    sent.step(first("a"))
    sent.step(last("a"))
    sent.expect("a", is_streaming=True)
    sent.step(TokenEvent("a", token_ids=[1]))
    sent.expect("b", is_streaming=False)
    sent.box.forget("b")
    sent.step(TokenEvent("b", token_ids=[2]))
    assert sent.tokens()[2:] == [[1], [2]]


@given(
    st.lists(
        st.tuples(
            st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=3, unique_by=lambda pair: pair[0]),
            st.sampled_from([0.0, 0.03, 0.2]),
        )
    )
)
def test_every_event_and_share_leaves_once_in_order_and_says_its_age(
    steps: list[tuple[list[tuple[str, bool]], float]],
) -> None:
    sent, made = Sent(), []
    for name in "abc":
        sent.expect(name, is_streaming=name == "c")
    for number, (news, after_s) in enumerate(steps):
        events = [
            TokenEvent(name, token_ids=[number], finish_reason=FinishReason.STOP if ends else None)
            for name, ends in news
        ]
        sent.step(*events, after_s=after_s, shares={name: 1.0 for name, _ in news})
        made += [(name, number, round(sent.now_s, 6)) for name, _ in news]
    sent.step()
    left = [
        (event.request_id, event.token_ids[0], round(at_s - event.age_s, 6))
        for at_s, report in sent.reports
        for event in report.events
    ]
    assert left == made
    shares = [share for _, report in sent.reports for share in report.shares.values()]
    assert sum(shares) == len(made)

import pytest
from microvllm.engine.policy import POLICIES, make_policy
from microvllm.engine.sequence import Sequence
from microvllm.engine.waiting_queue import WaitingQueue
from microvllm.model.sampling_params import SamplingParams


def sequence(id: int, num_prompt: int, max_tokens: int) -> Sequence:
    return Sequence(id, [0] * num_prompt, SamplingParams(max_tokens=max_tokens), max_length=num_prompt + max_tokens)


def drain(queue: WaitingQueue, which) -> list[int]:
    ids = []
    while (seq := which()) is not None:
        queue.remove(seq)
        ids.append(seq.id)
    return ids


@pytest.mark.parametrize("name, order", [("fcfs", [0, 1, 2, 3]), ("sjf", [2, 1, 3, 0]), ("sjf_aligned", [2, 1, 3, 0])])
def test_requests_are_admitted_in_the_policys_order(name, order):
    # Work is prompt and output together: 20, 8, 4, 8; equals go by arrival.
    queue = WaitingQueue(make_policy(name))
    for id, (num_prompt, max_tokens) in enumerate([(2, 18), (7, 1), (3, 1), (1, 7)]):
        queue.push(sequence(id, num_prompt, max_tokens))
    assert drain(queue, queue.best) == order


def test_work_left_is_prompt_left_and_max_tokens_less_what_is_generated():
    seq = sequence(0, 10, 5)
    assert seq.work_left == 15
    seq.num_computed = 6
    assert seq.work_left == 9
    seq.num_computed = 10
    seq.token_ids.append(1)
    seq.num_computed = 11
    assert seq.work_left == 4


@pytest.mark.parametrize("name", POLICIES)
def test_the_queue_knows_the_oldest_whatever_the_policy(name):
    queue = WaitingQueue(make_policy(name))
    for id, work in enumerate([9, 3, 7]):
        queue.push(sequence(id, work, 1))
    assert drain(queue, queue.oldest) == [0, 1, 2]
    assert queue.best() is None and len(queue) == 0


def test_a_request_can_leave_the_queue_and_come_back():
    queue = WaitingQueue(make_policy("sjf"))
    short, long = sequence(0, 1, 1), sequence(1, 9, 1)
    for seq in (long, short):
        queue.push(seq)
    for _ in range(3):
        queue.remove(short)
        assert queue.best() is queue.oldest() is long and len(queue) == 1
        queue.push(short)
        assert queue.best() is queue.oldest() is short and len(queue) == 2
    assert drain(queue, queue.best) == [0, 1]


def test_an_unknown_policy_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="policy='lifo' is not known; the policies are fcfs, sjf, sjf_aligned"):
        make_policy("lifo")


@pytest.mark.parametrize("name, window", [("sjf_aligned", -1), ("sjf", 0), ("fcfs", 16)])
def test_a_window_is_refused_where_it_means_nothing(name, window):
    with pytest.raises(ValueError, match=f"alignment_window={window} must be None, or at least 0.*'{name}' here"):
        make_policy(name, window)


@pytest.mark.parametrize("window", [None, 0, 16])
def test_the_aligned_policy_takes_a_window(window):
    assert make_policy("sjf_aligned", window).window == window

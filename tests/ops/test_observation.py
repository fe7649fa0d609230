import threading

import torch

from debiformer.ops import routed_attention
from debiformer.ops.observation import watch


def attend():
    q = torch.randn(1, 1, 2, 1, 4)
    return routed_attention(q, q, q, torch.tensor([[[0], [1]]]))


def test_a_watcher_sees_the_arguments_and_only_inside_the_block():
    seen = []
    with watch(lambda name, **arguments: seen.append((name, arguments))):
        attend()
    attend()
    ((name, arguments),) = seen
    assert name == "routed_attention"
    assert arguments["routes"].tolist() == [[[0], [1]]]
    assert arguments["scale"] == 0.5


def test_a_watcher_does_not_see_other_threads():
    seen = []
    with watch(lambda name, **_: seen.append(name)):
        thread = threading.Thread(target=attend)
        thread.start()
        thread.join()
    assert not seen

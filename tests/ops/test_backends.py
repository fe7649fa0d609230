import os
import subprocess
import sys
import threading

import pytest
import torch

import debiformer
from debiformer.layers import BiLevelRoutingAttention
from debiformer.ops import backends, choose_backend, routed_attention, use_backend

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_interpreter = pytest.mark.skipif(not (INTERPRETED and backends._TRITON_IS_INSTALLED), reason="Triton's interpreter is not there")


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv("DEBIFORMER_BACKEND", raising=False)


def arguments(dtype=torch.float32, width=4, value_width=4):
    q = torch.randn(1, 1, 2, 1, width, dtype=dtype)
    return q, q, torch.randn(1, 1, 2, 1, value_width, dtype=dtype), torch.tensor([[[0], [1]]])


def choice(*inputs, **asked):
    return choose_backend("routed_attention", *(inputs or arguments()), **asked)


def test_automatic_choice_says_why():
    assert choice() == ("eager", "q is on cpu")
    assert choice(*arguments(torch.float64)) == ("eager", "q is float64")
    assert choice(*arguments(value_width=5)) == ("eager", "values of another width than the keys")
    assert choice(*arguments(width=33, value_width=33)) == ("eager", "heads wider than 32 in float32")
    assert choice(*arguments(torch.bfloat16, 65, 65)) == ("eager", "heads wider than 64 in bfloat16")
    assert choice(*arguments(), torch.ones(1, 2, 1)) == ("eager", "soft routing")
    assert choice(*arguments()[:3], None).reason.startswith("all regions are routed to")
    assert choose_backend("deformable_attention", *arguments()[:3]) == ("eager", "q is on cpu")


def test_without_triton(monkeypatch):
    monkeypatch.setattr(backends, "_TRITON_IS_INSTALLED", False)
    assert choice() == ("eager", "Triton is not installed")


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((7, 5), ("eager", "compute capability 7.5 is below 8.0")), ((9, 0), ("triton", "the fused kernels take all of this"))],
)
def test_on_a_gpu(capability, expected, monkeypatch):
    class OnGPU:
        """What the choice looks at of a tensor."""

        device, dtype, shape = torch.device("cuda", 0), torch.bfloat16, (1, 1, 2, 1, 4)

    class Properties:
        major, minor = capability

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(backends, "_TRITON_IS_INSTALLED", True)
    assert choose_backend("deformable_attention", OnGPU, OnGPU, OnGPU) == expected


def test_precedence(monkeypatch):
    monkeypatch.setenv("DEBIFORMER_BACKEND", "reference")
    assert choice() == ("reference", "DEBIFORMER_BACKEND=reference")
    with use_backend("eager"):
        assert choice() == ("eager", "use_backend('eager') is in force")
        assert choice(backend="reference") == ("reference", "backend='reference' was given")
        with use_backend("auto"):
            assert choice() == ("reference", "DEBIFORMER_BACKEND=reference")
    monkeypatch.setenv("DEBIFORMER_BACKEND", "")
    assert choice() == ("eager", "q is on cpu")


def test_a_block_is_local_to_its_thread():
    found = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: found.append(choice().backend))
        thread.start()
        thread.join()
    assert found == ["eager"]


def test_the_choice_is_what_runs(monkeypatch):
    from debiformer.ops import routed_attention as function

    module = sys.modules[function.__module__]
    for name in ("eager", "reference"):
        ran = []
        monkeypatch.setitem(module.IMPLEMENTATIONS, name, lambda *_, ran=ran: ran.append(True))
        routed_attention(*arguments(), backend=name)
        with use_backend(name):
            routed_attention(*arguments())
        assert len(ran) == 2


def test_unknown_names_list_the_known(monkeypatch):
    known = "is not one of auto, triton, eager, reference"
    with pytest.raises(ValueError, match=f"backend='cuda' {known}"):
        choice(backend="cuda")
    with pytest.raises(ValueError, match=f"backend='cuda' {known}"), use_backend("cuda"):
        pass
    with pytest.raises(ValueError, match=f"backend='cuda' {known}"):
        BiLevelRoutingAttention(8, 2, backend="cuda")
    monkeypatch.setenv("DEBIFORMER_BACKEND", "cuda")
    with pytest.raises(ValueError, match=f"DEBIFORMER_BACKEND='cuda' {known}"):
        routed_attention(*arguments())
    with pytest.raises(ValueError, match="operation='attention' is neither"):
        choose_backend("attention", *arguments())


def test_triton_that_cannot_run_is_an_error(monkeypatch):
    with pytest.raises(ValueError, match=r"cannot run on Triton, though backend='triton' was given: q is float64"):
        routed_attention(*arguments(torch.float64), backend="triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backends, "_TRITON_IS_INSTALLED", True)
    with (
        pytest.raises(ValueError, match=r"cannot run on Triton, though use_backend\('triton'\) is in force: q is on cpu"),
        use_backend("triton"),
    ):
        routed_attention(*arguments())


@needs_interpreter
def test_a_layer_on_triton():
    layer = debiformer.layers.BiLevelRoutingAttention(16, 2, region_grid=2, topk=2)
    x = torch.randn(1, 5, 6, 16)
    with use_backend("triton"):
        found = layer(x)
    torch.testing.assert_close(found, layer(x))


def test_importing_the_package_leaves_triton_alone():
    program = "import sys, debiformer; sys.exit('debiformer.ops.triton' in ' '.join(sys.modules))"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


FIRST_CALL_COMPILED = """
import torch
from debiformer import use_backend
from debiformer.ops import routed_attention

q = torch.randn(1, 2, 3, 2, 8)
routes = torch.tensor([[[0, 1], [1, 2], [2, 0]]])
compiled = torch.compile(lambda q: routed_attention(q, q, q, routes), fullgraph=True, backend="aot_eager")
with use_backend("triton"):
    torch.testing.assert_close(compiled(q), routed_attention(q, q, q, routes, backend="eager"))
    assert hasattr(torch.ops.debiformer, "routed_attention")
torch.testing.assert_close(compiled(q), routed_attention(q, q, q, routes, backend="reference"))
"""


@needs_interpreter
def test_kernels_may_be_imported_by_a_compiler():
    run = subprocess.run([sys.executable, "-c", FIRST_CALL_COMPILED], check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_an_exported_graph_is_free_of_kernels():
    class Attend(torch.nn.Module):
        def forward(self, q, routes):
            return routed_attention(q, q, q, routes)

    q, _, _, routes = arguments()
    program = torch.export.export(Attend(), (q, routes))
    assert "debiformer" not in str(program.graph)
    assert torch.equal(program.module()(q, routes), routed_attention(q, q, q, routes))

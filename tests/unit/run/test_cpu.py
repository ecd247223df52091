"""The CPU backend without torchrun. Tests that install it run in a new process: it changes torch for good."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch

from megatron_et.run import cpu
from tests.megatron_here import needs_training


def run(code: str, **env: str) -> str:
    """Run Python code in a new process without a GPU; returns stdout and stderr together."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.mark.parametrize("value", ["1", "true", "YES"])
def test_requested(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(cpu.ENV, value)
    assert cpu.requested()


@pytest.mark.parametrize("value", [None, "", "0", "false", "No"])
def test_not_requested(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv(cpu.ENV, raising=False)
    if value is not None:
        monkeypatch.setenv(cpu.ENV, value)
    assert not cpu.requested()


def test_requested_refuses_what_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu.ENV, "maybe")
    with pytest.raises(ValueError, match=r"MEGATRON_ET_CPU='maybe' .* set it to 1"):
        cpu.requested()


def test_install_refuses_a_visible_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match=r"refuses to run on a machine with a GPU.*CUDA_VISIBLE_DEVICES="):
        cpu.install()
    assert not cpu.installed()


def test_install_refuses_to_come_after_megatron(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "megatron.core", object())
    with pytest.raises(RuntimeError, match=r"too late.*before the import"):
        cpu.install()
    assert not cpu.installed()


def test_install_is_idempotent_says_so_once_and_imports_no_megatron() -> None:
    output = run(
        """
        import sys, torch
        from megatron_et.run import cpu
        assert not cpu.installed()
        cpu.install()
        zeros = torch.zeros
        cpu.install()
        assert cpu.installed() and torch.zeros is zeros
        assert not any(name.startswith("megatron.") for name in sys.modules)
        """
    )
    assert output.count("CPU development backend is on") == 1


def test_only_rank_zero_says_so() -> None:
    assert "CPU development backend" not in run("from megatron_et.run import cpu; cpu.install()", RANK="1")


def test_every_replaced_torch_name_has_a_function_of_its_own() -> None:
    # torch._dynamo asserts it when it is imported, which torch's optimizers do.
    run(
        """
        import torch
        from megatron_et.run import cpu
        cpu.install()
        import torch._dynamo
        parameter = torch.nn.Parameter(torch.ones(2))
        optimizer = torch.optim.AdamW([parameter])
        parameter.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        """
    )


def test_torch_cuda_is_the_cpu() -> None:
    run(
        """
        import torch
        from megatron_et.run import cpu
        cpu.install()
        assert torch.cuda.is_available() and torch.cuda.device_count() == 3
        assert not torch.accelerator.is_available()

        for device in ("cuda", "cuda:1", torch.device("cuda", 0), torch.cuda.current_device(), None):
            made = [torch.tensor([1.0], device=device), torch.full((2,), 3, device=device)]
            for name in ("empty", "ones", "rand", "randn", "zeros"):
                made += [getattr(torch, name)(2, device=device)]
            made += [torch.empty_like(made[0], device=device)]
            assert {tensor.device.type for tensor in made} == {"cpu"}, device
        tensor = torch.zeros(2)
        assert tensor.cuda(non_blocking=True) is tensor
        assert torch.nn.Linear(2, 2).cuda(torch.cuda.current_device()).weight.device.type == "cpu"
        assert tensor.type() == "torch.cuda.FloatTensor"
        assert tensor.bfloat16().type() == "torch.cuda.BFloat16Tensor"
        assert tensor.type(torch.int64).dtype == torch.int64

        stream, event = torch.cuda.Stream(), torch.cuda.Event(enable_timing=True)
        tensor.record_stream(stream)
        with torch.cuda.stream(stream) as entered:
            assert entered is stream
        stream.wait_stream(torch.cuda.current_stream())
        stream.wait_event(event)
        event.record(stream)
        assert stream.record_event().query()
        torch.cuda.synchronize()
        torch.cuda.set_device(0)
        """,
        LOCAL_WORLD_SIZE="3",
    )


def test_the_cpu_generator_plays_the_gpus() -> None:
    run(
        """
        import torch
        from megatron_et.run import cpu
        cpu.install()
        from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

        torch.cuda.manual_seed(5)
        state, first = torch.cuda.get_rng_state(), torch.rand(3)
        torch.cuda.set_rng_state(state)
        assert torch.equal(first, torch.rand(3))

        tracker = get_cuda_rng_tracker()
        tracker.add("ours", 7)
        outside = torch.get_rng_state()
        with tracker.fork("ours"):
            inside = torch.rand(3)
        assert torch.equal(outside, torch.get_rng_state()), "fork() must restore the state around it"
        torch.manual_seed(7)
        assert torch.equal(inside, torch.rand(3)), "fork() must draw from the tracker's state"

        before = torch.get_rng_state()
        iter(torch.utils.data.DataLoader([1, 2]))
        assert torch.equal(before, torch.get_rng_state()), "a DataLoader moved dropout's generator"
        """
    )


def test_norm_under_sequence_parallelism() -> None:
    run(
        """
        from types import SimpleNamespace
        from megatron_et.run import cpu
        cpu.install()
        from megatron.core.transformer.torch_norm import WrappedTorchNorm

        for parallel in (True, False):
            config = SimpleNamespace(
                sequence_parallel=parallel, normalization="RMSNorm", persist_layer_norm=False,
                layernorm_zero_centered_gamma=False, memory_efficient_layer_norm=False,
            )
            norm = WrappedTorchNorm(config, hidden_size=4)
            assert norm.weight.shape == (4,) and norm.weight.sequence_parallel is parallel
            assert config.sequence_parallel is parallel
        """
    )


def test_inference_layers_need_no_transformer_engine_to_say_no() -> None:
    run(
        """
        from types import SimpleNamespace
        from megatron_et.run import cpu, repairs
        cpu.install()
        try:
            from megatron.core.tensor_parallel import inference_layers
        except ImportError:  # 0.16
            inference_layers = SimpleNamespace()
        # Newer ones ask isinstance() about classes that are None without Transformer Engine.
        ask = lambda module: isinstance(module, None)
        classless = SimpleNamespace(is_inference_column_parallel_linear=ask)
        repairs._repair_inference_layers(classless)
        for module in (classless, inference_layers):
            ask = getattr(module, "is_inference_column_parallel_linear", lambda module: False)
            assert ask(object()) is False
        """
    )


def test_two_pipeline_stages_with_virtual_stages_need_overlap() -> None:
    output = run(
        """
        from types import SimpleNamespace
        from megatron_et.run import cpu
        cpu.install()
        from megatron.core.pipeline_parallel import schedules

        config = SimpleNamespace(pipeline_model_parallel_size=2, overlap_p2p_comm=False)
        forward_backward = schedules.get_forward_backward_func(pp_size=2, vp_size=2)
        try:
            forward_backward(model=[SimpleNamespace(config=config)], forward_step_func=None)
        except ValueError as error:
            print(error)
        """
    )
    assert "need overlap_p2p_comm=True" in output


def test_a_megatron_without_a_repaired_name_is_refused_by_name() -> None:
    output = run(
        """
        from megatron_et.run import cpu, repairs
        cpu.install()
        def repair(module): module.not_there
        repairs.REPAIRS["megatron.core.transformer.torch_norm"] = repair
        try:
            import megatron.core.transformer.torch_norm
        except ImportError as error:
            print(error)
        """
    )
    assert "0.19.2" in output
    assert "'megatron.core.transformer.torch_norm' has no attribute 'not_there'" in output


@needs_training
def test_megatron_training_is_quiet_without_transformer_engine_and_knows_the_flags() -> None:
    output = run(
        """
        import sys
        from megatron_et.run import cpu
        cpu.install()
        from megatron.core.utils import get_te_version
        from megatron.training.arguments import parse_args
        assert str(get_te_version()) == "0.0.0"

        sys.argv[1:] = cpu.CPU_ARGS
        args = parse_args()
        assert (args.distributed_backend, args.transformer_impl, args.num_workers) == ("gloo", "local", 0)
        assert not args.gradient_accumulation_fusion
        """
    )
    assert "not installed" not in output

"""The support matrix knows every flag, refuses by name, and is what the documentation says."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from sglang_kevlar import support_matrix
from sglang_kevlar.platform import torchvision_shim
from sglang_kevlar.support_table import REFUSED, REFUSED_ENVIRONMENT, REMARKS
from sglang_kevlar.upstream.contract import SUPPORTED

LIMITS = Path(__file__).parents[2] / "docs" / "limits.md"


@pytest.fixture(scope="module")
def server_args_class():
    torchvision_shim.install()
    from sglang.srt.server_args import ServerArgs

    return ServerArgs


@pytest.fixture(scope="module")
def defaults(server_args_class):
    return server_args_class(model_path="m")


def refusals(defaults, environment=(), **values):
    return support_matrix.refusals(lambda name: values.get(name, getattr(defaults, name)), dict(environment))


def test_every_field_of_the_installed_version_is_known(server_args_class):
    assert support_matrix.unknown(server_args_class.__struct_fields__) == []
    assert support_matrix.known_fields() == set(server_args_class.__struct_fields__)


def test_an_unknown_flag_is_named():
    assert support_matrix.unknown(["tp_size", "brand_new"]) == ["unknown flag --brand-new: not in the support matrix"]


def test_the_tables_name_only_existing_flags_by_their_real_spelling(server_args_class):
    import argparse

    named = {row.field for row in REFUSED} | REMARKS.keys()
    assert named <= set().union(*map(support_matrix.fields_of, SUPPORTED))
    fields = named & support_matrix.known_fields()
    parser = argparse.ArgumentParser()
    server_args_class.add_cli_args(parser)
    spellings = {spelling for action in parser._actions for spelling in action.option_strings}
    internal = {"forward_pass_metrics_ipc_name", "enable_cp_tp_group_sharing"}
    assert {support_matrix.option(field) for field in fields - internal} <= spellings


def test_a_list_that_is_a_difference_differs_in_what_it_says():
    older, newer = (support_matrix.fields_of(version) for version in ("0.5.21", "0.5.23"))
    assert {"attn_dp_size", "enable_watermark"} <= newer - older
    assert "cuda_graph_tc_compiler" in older - newer


def test_a_flag_that_the_installed_version_lacks_is_not_asked_for(monkeypatch):
    monkeypatch.setattr(support_matrix, "known_fields", lambda: frozenset({"skip_tokenizer_init"}))
    asked = []
    assert support_matrix.refusals(asked.append, {}) == []
    assert asked == ["skip_tokenizer_init"]


def test_defaults_are_not_refused(defaults):
    assert refusals(defaults) == []


@pytest.mark.parametrize(
    ("field", "value", "shown"),
    [
        ("dp_size", 2, "--dp-size 2:"),
        ("nnodes", 2, "--nnodes 2:"),
        ("disaggregation_mode", "prefill", "--disaggregation-mode prefill:"),
        ("tokenizer_worker_num", 4, "--tokenizer-worker-num 4:"),
        ("smg_grpc_mode", True, "--smg-grpc-mode:"),
        ("grpc_port", 5000, "--grpc-port 5000:"),
        ("speculative_algorithm", "EAGLE", "--speculative-algorithm EAGLE:"),
        ("ep_join_mode", "scale", "--elastic-ep-join-mode scale:"),
        ("enable_streaming_session", True, "--enable-streaming-session:"),
        ("weight_cache_mode", "daemon", "--weight-cache-mode daemon:"),
        ("load_publish_endpoint", "auto", "--load-publish-endpoint auto:"),
        ("device", "npu", "--device npu:"),
    ],
)
def test_refused_by_name_and_with_a_reason(defaults, field, value, shown):
    [message] = refusals(defaults, **{field: value})
    assert message.startswith(shown)
    assert len(message) > len(shown) + 10


@pytest.mark.parametrize(
    ("field", "value"),
    [("dp_size", 1), ("ep_size", 2), ("load_publish_endpoint", "off"), ("load_format", "dummy"), ("device", "cuda")],
)
def test_served(defaults, field, value):
    assert refusals(defaults, **{field: value}) == []


def test_all_findings_are_reported_at_once(defaults):
    assert len(refusals(defaults, dp_size=2, nnodes=2, use_ray=True)) == 3


@pytest.mark.parametrize("name", REFUSED_ENVIRONMENT)
def test_environment_that_selects_another_server(defaults, name):
    [message] = refusals(defaults, environment={name: "1"})
    assert message.startswith(f"{name} in the environment:")
    assert refusals(defaults, environment={name: "0"}) == []


def test_a_multimodal_model_is_refused_by_architecture():
    config = SimpleNamespace(
        is_multimodal=True, model_path="p", hf_config=SimpleNamespace(architectures=["SomeVLForCausalLM"])
    )
    [message] = support_matrix.model_refusals(config)
    assert "--model-path p" in message and "SomeVLForCausalLM" in message
    config.is_multimodal = False
    assert support_matrix.model_refusals(config) == []


def test_no_flag_is_both_refused_for_every_use_and_remarked():
    both = {row.field for row in REFUSED} & REMARKS.keys()
    assert both == {"load_format", "weight_cache_mode"}  # one value refused, another remarked


def test_the_documentation_is_in_sync():
    text = LIMITS.read_text()
    assert support_matrix.in_document(text) == text, (
        "run python -m sglang_kevlar.support_matrix --update docs/limits.md"
    )

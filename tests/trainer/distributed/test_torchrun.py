"""Which options reach torchrun, of old and of new versions of torch."""

from argparse import ArgumentParser

import pytest
from torch.distributed.run import get_args_parser

from launch.local import torchrun
from trainer.distributed.torchrun import TIMEOUT, known_to

OPTIONS = ["--standalone", TIMEOUT, "17", "--nproc-per-node", "2"]


def parser_of(*options: str) -> ArgumentParser:
    parser = ArgumentParser()
    for option in options:
        parser.add_argument(option)
    return parser


def test_a_torchrun_that_knows_no_shutdown_timeout_is_not_given_one():
    old = parser_of("--nproc-per-node")
    assert known_to(old, OPTIONS) == ["--standalone", "--nproc-per-node", "2"]
    assert known_to(old, OPTIONS[:1]) == ["--standalone"]


def test_a_torchrun_that_knows_it_is_given_all():
    assert known_to(parser_of(TIMEOUT), OPTIONS) == OPTIONS


@pytest.mark.parametrize("processes", [2, 16])
def test_the_torch_that_is_here_reads_what_the_launcher_writes(processes):
    options = torchrun(processes)[4:-1]  # behind python -P -m trainer.distributed.torchrun
    read = get_args_parser().parse_args([*known_to(get_args_parser(), options), "program"])
    assert read.nproc_per_node == str(processes) and read.standalone

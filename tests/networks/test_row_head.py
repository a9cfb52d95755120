"""A head that learns by rows: its gradients, and the plain layer that it stands for."""

import torch
from torch import nn

from networks.row_head import RowGradients, RowHead, sum_rows


def test_gradients_of_what_was_read_are_the_whole_layers():
    torch.manual_seed(0)
    linear, x = nn.Linear(3, 9), torch.randn(4, 3)
    head = RowHead(linear)
    for classes in ([1, 4, 7], [0, 4, 8]):
        classes = torch.tensor(classes)
        logits = head.read(head(x), classes)
        logits.of_classes(torch.arange(3)).square().sum().backward()
        linear(x)[:, classes].square().sum().backward()
    gradients = head.take_gradients()
    assert gradients.classes.tolist() == [0, 1, 4, 7, 8]
    assert linear.weight.grad is not None and linear.bias.grad is not None
    torch.testing.assert_close(gradients.weight, linear.weight.grad[gradients.classes])
    torch.testing.assert_close(gradients.bias, linear.bias.grad[gradients.classes])


def test_what_is_read_without_gradients_leaves_none():
    head = RowHead(nn.Linear(3, 9))
    with torch.no_grad():
        head.read(torch.zeros(1, 3), torch.tensor([2]))
    assert head._read == []


def test_rows_of_several_parts_are_added_up():
    def part(classes, value):
        size = len(classes)
        return RowGradients(
            torch.tensor(classes), torch.full((size, 2), value), torch.full((size,), value)
        )

    total = sum_rows([part([1, 3], 1.0), part([0, 3], 10.0)])
    assert total.classes.tolist() == [0, 1, 3]
    assert total.weight.tolist() == [[10, 10], [1, 1], [11, 11]]
    assert total.bias.tolist() == [10, 1, 11]


def test_the_plain_layer_has_its_memory_and_it_moves_with_the_network():
    linear = nn.Linear(3, 9)
    head = RowHead(linear)
    assert head.whole().weight.data_ptr() == linear.weight.data_ptr() == head.weight.data_ptr()
    assert not list(head.parameters()) and not head.state_dict()
    network = nn.Sequential(head).double()
    assert head.weight.dtype == head.bias.dtype == torch.float64
    assert network(torch.ones(1, 3)).tolist() == [[1, 1, 1]]

"""Sites of hand-written graphs: no torch, a handful of ops each."""

import pytest

from equalize.graph.graph import Graph, Op
from equalize.sites.sites import Site, find_sites

WEIGHTS = {
    "a.weight": (4, 3, 3, 3),
    "b.weight": (2, 3, 3, 3),
    "fuse.weight": (5, 6, 3, 3),
    "fuse.bias": (5,),
    "other.weight": (5, 6, 1, 1),
    "last.weight": (3, 11, 1, 1),
    "depthwise.weight": (6, 1, 3, 3),
    "grouped.weight": (4, 3, 1, 1),
    "transposed.weight": (6, 5, 2, 2),
    "linear.weight": (5, 6),
    "norm.running_mean": (5,),
}


def op(name, kind, *inputs, shape=(1, 6, 8, 8), module="", parameters=None, target="", **attributes):
    return Op(
        name=name,
        kind=kind,
        inputs=inputs,
        shape=shape,
        module=module,
        parameters=parameters or {},
        target=target or name,
        attributes=attributes,
    )


def layer(name, data, *, bias=False, groups=1, stride=(1, 1), padded=False, transposed=False, shape=(1, 5, 8, 8)):
    parameters = {"weight": f"{name}.weight"} | ({"bias": f"{name}.bias"} if bias else {})
    return op(
        name, "convolution", data, shape=shape, module=name, parameters=parameters, target="conv2d",
        groups=groups, stride=stride, padded=padded, transposed=transposed,
    )  # fmt: skip


def branches():
    """Two layers, the first at half size, brought together: channels 0..4 and 4..6."""
    return [
        op("x", "input", shape=(1, 3, 8, 8)),
        op("small", "pool", "x", shape=(1, 3, 4, 4)),
        layer("a", "small", shape=(1, 4, 4, 4)),
        op("up", "resample", "a", shape=(1, 4, 8, 8), mode="bilinear"),
        layer("b", "x", shape=(1, 2, 8, 8)),
        op("cat", "concat", "up", "b", dim=1, module="head"),
    ]


def found(*ops: Op, **shapes):
    graph = Graph(ops=(*branches(), *ops, op("out", "output", ops[-1].name)), shapes=WEIGHTS | shapes)
    return find_sites(graph)


def only(*ops: Op) -> Site:
    sites, refusals = found(*ops)
    assert refusals == ()
    (site,) = sites
    return site


def reasons(*ops: Op) -> str:
    sites, refusals = found(*ops)
    assert sites == ()
    (refusal,) = refusals
    assert refusal.at == "head"
    return refusal.reason


def test_two_branches_and_a_layer():
    site = only(layer("fuse", "cat", bias=True, padded=True))
    assert (site.layer, site.weight, site.bias, site.norm) == ("fuse", "fuse.weight", "fuse.bias", None)
    assert (site.op, site.kernel, site.axis, site.groups) == ("conv2d", (3, 3), 1, 1)
    assert (site.kind, site.exact_border, site.shift) == ("resampled", False, "bias")
    low, high = site.branches
    assert (low.start, low.stop, low.resampling, low.factor, low.source) == (0, 4, "bilinear", (2.0, 2.0), "a")
    assert (high.start, high.stop, high.resampling, high.factor, high.source) == (4, 6, None, (1.0, 1.0), "b")
    assert (low.producers, low.fixed) == (("a.weight",), None)
    assert (high.producers, high.fixed) == (("b.weight",), None)


def norm(data, *, per_channel=True, **more):
    return op("norm", "norm", data, module="norm", shape=(1, 5, 8, 8), parameters=more, per_channel=per_channel)


FUSE = layer("fuse", "cat", bias=True, padded=True)


def test_a_norm_per_channel_behind_takes_every_constant_out():
    site = only(FUSE, norm("fuse", running_mean="norm.running_mean"))
    assert (site.norm, site.shift, site.exact_border, site.norms) == ("norm", None, True, ("norm.running_mean",))


def test_other_norms_behind_leave_the_shift_to_the_bias():
    site = only(FUSE, norm("fuse", per_channel=False))
    assert (site.norm, site.shift, site.exact_border, site.norms) == ("norm", "bias", False, ())


def test_a_norm_that_is_not_alone_behind_changes_nothing():
    site = only(FUSE, norm("fuse", running_mean="norm.running_mean"), op("sum", "add", "fuse", "norm"))
    assert (site.norm, site.shift) == (None, "bias")


def test_a_norm_is_behind_a_change_of_view_but_not_behind_an_activation():
    view = op("view", "reshape", "fuse", shape=(1, 5, 64))
    assert only(FUSE, view, norm("view")).shift is None
    assert only(FUSE, op("act", "relu", "fuse", shape=(1, 5, 8, 8)), norm("act")).shift == "bias"


def test_a_norm_per_channel_of_another_axis_changes_nothing():
    moved = op("moved", "permute", "fuse", shape=(1, 8, 8, 5), order=[0, 2, 3, 1])
    assert only(FUSE, moved, norm("moved")).shift == "bias"


def test_a_layer_without_a_bias_has_no_place_for_the_shift():
    site = only(layer("fuse", "cat", padded=True))
    assert (site.shift, site.exact_border) == (None, True)


WAYS = {  # kind and attributes between the concat and the layer: exact border, shift
    "dropout": (op("way", "identity", "cat"), True, "bias"),
    "crop": (op("way", "crop", "cat", shape=(1, 6, 4, 8)), True, "bias"),
    "zero pad": (op("way", "pad", "cat", shape=(1, 6, 10, 10), zero=True, mode="constant"), False, "bias"),
    "reflection": (op("way", "pad", "cat", shape=(1, 6, 10, 10), zero=False, mode="reflect"), True, "bias"),
    "resampling": (op("way", "resample", "cat", shape=(1, 6, 16, 16), mode="nearest"), True, "bias"),
    "relu": (op("way", "relu", "cat"), True, None),
    "pooling": (op("way", "pool", "cat", shape=(1, 6, 4, 4)), True, None),
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_from_the_concat_to_the_layer(way):
    between, exact, shift = WAYS[way]
    site = only(between, layer("fuse", "way", bias=True))
    assert (site.exact_border, site.shift) == (exact, shift)
    assert [branch.fixed for branch in site.branches] == [None, None]


ENDS = {
    "a norm": (op("end", "norm", "cat", module="norm", target="layer_norm"), "already normalized by layer_norm norm"),
    "an activation": (op("end", "activation", "cat", target="gelu", module="act"), "gelu in act is not linear"),
    "an addition": (op("end", "add", "cat", "x", target="add", module="sum"), "add in sum is not linear"),
    "a pad by ones": (op("end", "pad", "cat", target="pad", zero=False, mode="constant"), "is not linear"),
    "a slice of channels": (op("end", "crop", "cat", shape=(1, 3, 8, 8), target="slice"), "do not stay whole in slice"),
    "a pad of channels": (op("end", "pad", "cat", shape=(1, 8, 8, 8), zero=True, mode="constant"), "stay whole"),
    "a reshape": (op("end", "reshape", "cat", shape=(1, 2, 3, 64), target="view"), "do not stay whole in view"),
    "the output": (op("end", "output", "cat"), "returned as an output"),
}


@pytest.mark.parametrize("end", ENDS)
def test_ends_without_a_fusion_layer(end):
    last, reason = ENDS[end]
    assert reason in reasons(last)


def test_nobody_reads_it():
    assert reasons(op("elsewhere", "relu", "b")) == "nothing reads it"


@pytest.mark.parametrize(
    ("name", "options", "axis"),
    [
        ("depthwise", {"groups": 6}, 0),
        ("grouped", {"groups": 2}, 1),
        ("transposed", {"transposed": True}, 0),
    ],
)
def test_where_input_channels_are_in_the_weight(name, options, axis):
    site = only(layer(name, "cat", **options))
    assert (site.axis, site.groups) == (axis, options.get("groups", 1))


def test_strided_transposed_layers_take_the_scale_only():
    strided = op(
        "t", "convolution", "cat", module="transposed", target="conv_transpose2d", groups=1, stride=(2, 2),
        parameters={"weight": "transposed.weight", "bias": "fuse.bias"}, padded=False, transposed=True,
    )  # fmt: skip
    site = only(strided)
    assert (site.bias, site.shift) == ("fuse.bias", None)


def linear(data, **more):
    parameters = {"weight": "linear.weight"}
    return op("linear", "linear", data, module="linear", target="linear", parameters=parameters, **more)


def test_linear_layers_read_the_last_axis():
    moved = op("moved", "permute", "cat", shape=(1, 8, 8, 6), order=[0, 2, 3, 1])
    site = only(moved, linear("moved"))
    assert (site.op, site.kernel, site.axis, site.exact_border) == ("linear", (), 1, True)
    tokens = op("tokens", "reshape", "moved", shape=(1, 64, 6))
    assert only(moved, tokens, linear("tokens")).layer == "linear"


def test_layers_that_sum_over_another_axis():
    assert "along axis 1 of [1, 6, 8, 8], which linear does not sum over" in reasons(linear("cat"))
    moved = op("moved", "permute", "cat", shape=(1, 8, 8, 6), order=[0, 2, 3, 1])
    assert "along axis 3 of [1, 8, 8, 6], which fuse does not sum over" in reasons(moved, layer("fuse", "moved"))


def test_concat_of_the_weight_is_no_input():
    data = op("data", "convolution", "x", "cat", module="dynamic", parameters={"weight": None}, groups=1,
              stride=(1, 1), padded=False, transposed=False)  # fmt: skip
    assert "which dynamic does not sum over" in reasons(data)


def test_weights_that_cannot_be_rewritten():
    computed = op("fuse", "convolution", "cat", module="fuse", parameters={"weight": None}, groups=1, stride=(1, 1),
                  padded=False, transposed=False)  # fmt: skip
    assert reasons(computed) == "the weight of fuse is not a plain parameter"
    bias = op("fuse", "convolution", "cat", module="fuse", parameters={"weight": "fuse.weight", "bias": None},
              groups=1, stride=(1, 1), padded=False, transposed=False)  # fmt: skip
    assert reasons(bias) == "the bias of fuse is not a plain parameter"


def test_weights_used_twice():
    assert reasons(layer("fuse", "cat"), op("again", "convolution", "x", parameters={"weight": "fuse.weight"},
        groups=1, stride=(1, 1), padded=False, transposed=False)) == "fuse.weight is used 2 times"  # fmt: skip
    read = [op("p_weight", "constant", key="fuse.weight"), op("size", "other", "p_weight")]
    assert reasons(layer("fuse", "cat"), *read) == "fuse.weight is used 2 times"


def test_two_layers_read_one_concat():
    sites, refusals = found(layer("fuse", "cat"), layer("other", "cat"), op("sum", "add", "fuse", "other"))
    assert [site.layer for site in sites] == ["fuse", "other"]
    assert refusals == ()
    for site, other in zip(sites, reversed(sites), strict=True):
        assert [branch.producers for branch in site.branches] == [("a.weight",), ("b.weight",)]
        ranges = [(each.weight, each.start, each.stop) for branch in site.branches for each in branch.readers]
        assert ranges == [(other.weight, 0, 4), (other.weight, 4, 6)]


READ = {  # what else reads the concat: why no branch can move
    "a norm": ([op("end", "norm", "cat", module="head.norm", target="batch_norm")], "batch_norm in head.norm, which"),
    "an activation": (
        [op("end", "activation", "cat", module="act", target="gelu")],
        "gelu in act, which does not pass a change of scale",
    ),
    "the output": ([op("end", "output", "cat")], "this branch is an output of the network too"),
    "an addition": (
        [op("end", "add", "cat", "x", target="add")],
        "feeds another layer too: add in end, which does not pass",
    ),
    "a slice of channels": (
        [op("end", "crop", "cat", shape=(1, 3, 8, 8), target="slice")],
        "feeds another layer too: slice in end, which does not keep its channels apart",
    ),
    "another axis": ([linear("cat")], "another layer too: linear, which does not sum over its channels"),
    "a computed weight": (
        [op("dynamic", "convolution", "cat", parameters={"weight": None}, groups=1, stride=(1, 1), transposed=False)],
        "another layer too: dynamic, whose weight is not a plain parameter",
    ),
    "a layer that is used twice": (
        [layer("other", "cat"), op("again", "linear", "x", parameters={"weight": "other.weight"})],
        "another layer too: other, whose weight is used 2 times",
    ),
}


@pytest.mark.parametrize("case", READ)
def test_other_readers_that_cannot_follow_are_named(case):
    others, reason = READ[case]
    sites, _ = found(layer("fuse", "cat"), *others)
    (site,) = [site for site in sites if site.layer == "fuse"]
    for branch in site.branches:
        assert reason in str(branch.fixed)
        assert (branch.producers, branch.readers) == ((), ())


def test_readers_behind_ops_that_commute_with_a_scale():
    """One branch is read by a pooled depthwise layer of its own, the other by a transposed one through a concat."""
    sites, _ = found(
        layer("fuse", "cat"),
        op("pooled", "pool", "a", shape=(1, 4, 2, 2)),
        layer("own", "pooled", groups=4, shape=(1, 4, 2, 2)),
        op("more", "concat", "x", "b", shape=(1, 5, 8, 8), dim=1),
        op("dropped", "identity", "more", shape=(1, 5, 8, 8)),
        layer("up2", "dropped", transposed=True, shape=(1, 3, 16, 16)),
        **{"own.weight": (4, 1, 3, 3), "up2.weight": (5, 3, 2, 2)},
    )
    (low,), (high,) = (branch.readers for branch in next(each for each in sites if each.layer == "fuse").branches)
    assert (low.weight, low.axis, low.groups, low.start, low.stop) == ("own.weight", 0, 4, 0, 4)
    assert (high.weight, high.axis, high.groups, high.start, high.stop) == ("up2.weight", 0, 1, 3, 5)


def test_one_tensor_in_two_branches_of_one_layer_cannot_move():
    ops = [
        *branches()[:-1],
        op("smaller", "pool", "b", shape=(1, 2, 4, 4)),
        op("larger", "resample", "smaller", shape=(1, 2, 8, 8), mode="nearest"),
        op("cat", "concat", "up", "larger", "b", shape=(1, 8, 8, 8), dim=1),
        layer("fuse", "cat"),
    ]
    (site,), _ = find_sites(Graph(ops=tuple(ops), shapes=WEIGHTS | {"fuse.weight": (5, 8, 3, 3)}))
    assert [branch.fixed for branch in site.branches] == [
        None,
        *["this branch feeds fuse a second time, as another branch"] * 2,
    ]


def test_one_layer_and_one_refusal_from_one_concat():
    sites, refusals = found(layer("fuse", "cat"), op("gelu", "activation", "cat"), op("sum", "add", "fuse", "gelu"))
    assert [site.layer for site in sites] == ["fuse"]
    assert [refusal.reason for refusal in refusals] == ["its consumer gelu in gelu is not linear"]


def test_concats_of_concats_are_one_list():
    site = only(
        op("drop", "identity", "cat"),
        op("more", "identity", "x", shape=(1, 5, 8, 8)),
        op("outer", "concat", "drop", "more", shape=(1, 11, 8, 8), dim=1),
        layer("last", "outer"),
    )
    assert [(branch.start, branch.stop) for branch in site.branches] == [(0, 4), (4, 6), (6, 11)]
    assert [branch.fixed is None for branch in site.branches] == [True, True, False]


def test_concats_along_another_axis_are_refused():
    taller = op("outer", "concat", "cat", "cat", shape=(1, 6, 16, 8), dim=2)
    sites, refusals = found(taller, layer("fuse", "outer"))
    assert sites == ()
    assert [refusal.reason for refusal in refusals] == [
        "concatenated again along another axis in outer",
        "concatenated along axis 2 of [1, 6, 16, 8], which fuse does not sum over",
    ]


def test_inner_concats_that_are_read_again_are_read_by_both_layers():
    sites, _ = found(
        op("more", "relu", "x", shape=(1, 5, 8, 8)),
        op("outer", "concat", "cat", "more", shape=(1, 11, 8, 8), dim=1),
        layer("last", "outer"),
        layer("fuse", "cat"),
        op("sum", "add", "last", "fuse"),
    )
    last = next(site for site in sites if site.layer == "last")
    assert [[reader.weight for reader in branch.readers] for branch in last.branches] == [["fuse.weight"]] * 2 + [[]]
    assert [branch.fixed is None for branch in last.branches] == [True, True, False]


HELD = {  # the op between b and the concat: why the branch cannot move
    "gelu": (
        op("way", "activation", "b", shape=(1, 2, 8, 8), target="gelu"),
        "it comes from gelu in way, which does not pass",
    ),
    "add": (
        op("way", "add", "b", "x", shape=(1, 2, 8, 8), target="add"),
        "it comes from add in way, which does not pass",
    ),
    "pad by one": (op("way", "pad", "b", shape=(1, 2, 8, 8), target="pad", zero=False, mode="constant"), "pad in way"),
    "bare norm": (
        op("way", "norm", "b", shape=(1, 2, 8, 8), target="batch_norm"),
        "batch_norm way, which has no weight and bias",
    ),
    "tied norm": (
        op("way", "norm", "b", shape=(1, 2, 8, 8), parameters={"weight": "a.weight"}),
        "a.weight is used 2 times",
    ),
    "relu": (op("way", "relu", "b", shape=(1, 2, 8, 8)), None),
    "pool": (op("way", "pool", "b", shape=(1, 2, 8, 8)), None),
    "zero pad": (op("way", "pad", "b", shape=(1, 2, 8, 8), zero=True, mode="constant"), None),
}


@pytest.mark.parametrize("case", HELD)
def test_what_holds_a_branch(case):
    way, reason = HELD[case]
    ops = [*branches()[:-1], way, op("cat", "concat", "up", "way", dim=1, module="head"), layer("fuse", "cat")]
    (site,), _ = find_sites(Graph(ops=tuple(ops), shapes=WEIGHTS))
    branch = site.branches[1]
    assert (branch.fixed is None) == (reason is None)
    assert reason is None or reason in str(branch.fixed)
    assert branch.producers == (("b.weight",) if reason is None else ())


RESAMPLED = {
    "nearest": (op("up", "resample", "a", shape=(1, 4, 8, 16), mode="nearest"), "nearest", (2.0, 4.0)),
    "shrunk": (op("up", "resample", "a", shape=(1, 4, 2, 2), mode="area"), "area", (0.5, 0.5)),
    "shuffled": (op("up", "pixel_shuffle", "a", shape=(1, 4, 8, 8), factor=2), "pixel_shuffle", (2.0, 2.0)),
    "transposed": (
        layer("transposed", "a", stride=(2, 4), transposed=True, shape=(1, 4, 8, 16)),
        "transposed_conv",
        (2.0, 4.0),
    ),
    "transposed at stride one": (
        layer("transposed", "a", transposed=True, shape=(1, 4, 8, 8)),
        None,
        (1.0, 1.0),
    ),
}


@pytest.mark.parametrize("case", RESAMPLED)
def test_ways_to_resample(case):
    last, resampling, factor = RESAMPLED[case]
    through = [
        op("gelu", "activation", last.name, shape=(1, 4, 8, 8)),
        op("scaled", "elementwise", "gelu", "b", shape=(1, 4, 8, 8)),
        op("normed", "norm", "scaled", shape=(1, 4, 8, 8)),
        op("cat", "concat", "normed", "b", dim=1),
        layer("fuse", "cat"),
    ]
    ops = [*branches()[:3], branches()[4], last, *through]
    (site,), _ = find_sites(Graph(ops=tuple(ops), shapes=WEIGHTS))
    assert (site.branches[0].resampling, site.branches[0].factor) == (resampling, factor)
    assert site.kind == ("plain" if resampling is None else "resampled")


@pytest.mark.parametrize("kind", ["convolution", "linear", "pool", "other"])
def test_resampling_before_a_mixing_of_channels_or_places_is_not_the_branchs(kind):
    mixed = op("mixed", kind, "up", shape=(1, 4, 8, 8), groups=1, stride=(1, 1), padded=False, transposed=False)
    ops = [*branches()[:-1], mixed, op("cat", "concat", "mixed", "b", dim=1), layer("fuse", "cat")]
    (site,), _ = find_sites(Graph(ops=tuple(ops), shapes=WEIGHTS))
    assert site.kind == "plain"


def test_a_resampled_constant_is_no_feature():
    constant = [
        op("table", "constant", key="table", shape=(1, 4, 2, 2)),
        op("grown", "resample", "table", shape=(1, 4, 8, 8), mode="bicubic"),
        op("plus", "add", "b", "grown", shape=(1, 4, 8, 8)),
        op("cat", "concat", "plus", "b", dim=1),
        layer("fuse", "cat"),
    ]
    (site,), _ = find_sites(Graph(ops=(*branches()[:-1], *constant), shapes=WEIGHTS))
    assert site.branches[0].resampling is None


def test_unbatched_and_flat_inputs_have_their_own_rank():
    ops = (
        op("x", "input", shape=(3, 8, 8)),
        op("y", "relu", "x", shape=(3, 8, 8)),
        op("cat", "concat", "x", "y", shape=(6, 8, 8), dim=0),
        layer("fuse", "cat", shape=(5, 8, 8)),
    )
    (site,), _ = find_sites(Graph(ops=ops, shapes=WEIGHTS))
    assert [branch.factor for branch in site.branches] == [(1.0, 1.0)] * 2


def test_upstream_and_order():
    sites, _ = found(
        layer("fuse", "cat"),
        op("norm", "norm", "fuse", shape=(1, 5, 8, 8), parameters={"running_mean": "norm.running_mean"}),
        op("outer", "concat", "cat", "norm", shape=(1, 11, 8, 8), dim=1),
        layer("last", "outer"),
    )
    first, last = sites
    assert (first.layer, first.upstream, first.norms) == ("fuse", (), ("norm.running_mean",))
    assert (last.layer, last.upstream, last.norms) == ("last", ("fuse",), ())


def test_layers_take_the_weights_name_where_a_module_holds_several():
    kernel = op("c", "convolution", "cat", module="head", target="conv2d", parameters={"weight": "head.kernel"},
                groups=1, stride=(1, 1), padded=False, transposed=False)  # fmt: skip
    sites, _ = found(kernel, **{"head.kernel": (5, 6, 1, 1)})
    assert [(site.layer, site.weight) for site in sites] == [("head.kernel", "head.kernel")]


def addition(*ops: Op) -> list[tuple[str, str]]:
    graph = Graph(ops=(*branches()[:-1], *ops, op("out", "output", ops[-1].name)), shapes=WEIGHTS)
    sites, refusals = find_sites(graph)
    assert sites == ()
    return [(refusal.at, refusal.reason.split(":")[0]) for refusal in refusals]


def test_networks_that_fuse_by_addition_are_told_so():
    total = op("sum", "add", "up", "b", module="decoder")
    assert addition(total) == [("decoder", "fuses by addition")]
    pointwise = layer("other", "up")
    assert addition(pointwise, op("sum", "add", "other", "b", module="head")) == [("head", "fuses by addition")]


def test_residual_additions_are_no_fusion():
    residual = [op("relu", "relu", "up"), op("sum", "add", "up", "relu", module="block")]
    assert addition(*residual) == [("model", "has no concat of features")]
    position = [
        op("table", "constant", key="table"),
        op("grown", "resample", "table", mode="bicubic"),
        op("sum", "add", "b", "grown", module="embeddings"),
    ]
    assert addition(*position) == [("model", "has no concat of features")]

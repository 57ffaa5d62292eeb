"""Which passes run, in what order, each constraint with its reason."""

from __future__ import annotations

from onnxq import passes as p
from onnxq.equalization import Equalizing
from onnxq.passmanager import Pass

# What undoes a quantization that the model came with; once, before all else. The ranges are kept in Model.trained.
RECOVER: tuple[type[Pass], ...] = (
    p.FoldConstants,  # parameters may come through Constant and Identity; Q and DQ it leaves
    p.ExpandQoperators,  # before the others, which know only Q and DQ
    p.ExpandDynamic,
    p.RemoveFakeQuantize,
    p.FoldWeightDequantize,  # before remove-quantize-pairs, which is about activations
    p.RemoveQuantizePairs,
)
# Float passes, run over and over until none finds work, then proved equal to the model that was loaded.
FLOAT: tuple[type[Pass], ...] = (
    p.RaiseOpset,  # first: every later pass reads the attributes and inputs of opset 13
    p.FoldConstants,  # before shapes are inferred: a Reshape's target is then a constant
    p.InferShapes,  # before whatever asks for ranks and types
    p.LearnTypes,  # what inference knows nothing of
    p.FoldShapes,  # needs shapes; frees Reshapes and Pads from Shape arithmetic
    p.RemoveIdentity,
    p.RemoveDropout,
    p.RemoveCast,  # needs types
    p.RemoveReshapePairs,
    p.RemoveTransposePairs,
    p.DeduplicateConstants,  # before fusing, which gives each layer constants of its own
    p.FuseClip,  # the recognisers, before anything takes their patterns apart; each before those that build on it
    p.FuseHardswish,  # before fuse-hardsigmoid, which takes a part of it
    p.FuseHardsigmoid,
    p.FuseSigmoid,
    p.FuseGelu,
    p.FuseSoftmax,
    p.FuseInstancenorm,  # before fuse-layernorm, which takes what is left
    p.FuseLayernorm,
    p.FuseRmsnorm,
    p.FuseRotary,
    p.FuseConvBatchnorm,  # before fold-batchnorm, which takes what is left
    p.FuseGemmBatchnorm,
    p.FusePad,  # needs constant pads
    p.FuseMatmulAdd,
    p.FuseReducemean,
    p.FoldSub,  # before fuse-conv-affine, which knows only Add and Mul
    p.FoldDiv,
    p.FuseConvAffine,
    p.FoldBatchnorm,
)
EQUALIZE: tuple[type[Equalizing], ...] = (  # float passes too, and proved; once, after a first look at a few samples
    p.EqualizeLayers,
    p.EqualizeGates,
)
DYNAMIC: tuple[type[Pass], ...] = (  # all there is to mode dynamic, after the float passes
    p.AnnotateCompute,
    p.AnnotateDynamic,  # takes back what annotate-compute says of convolutions
    p.AnnotateEmbeddings,
    p.ChooseWeightRanges,
    p.InsertDynamic,
    p.InsertDynamicLstm,
    p.InsertWeightOnly,  # what the two above leave
    p.QuantizeWeights,  # of embeddings
    p.GatherBeforeDequantize,
)
PLACE: tuple[type[Pass], ...] = (
    p.AnnotateCompute,  # what starts integer regions
    p.AnnotateAttention,  # after annotate-compute, whose reason for a product it makes more exact
    p.AnnotateRegions,  # grows them
    p.AnnotateResiduals,  # needs to know which layers are integer
    p.AnnotateEmbeddings,  # leaves alone what is a layer's weight
)
OBSERVE: tuple[type[Pass], ...] = (
    p.CollectStatistics,
    p.ChooseRanges,
    p.ShareConcatRanges,  # widens what choose-ranges chose
    p.ChooseWeightRanges,
)
SELECT: tuple[type[Pass], ...] = (
    p.SelectDynamic,
    p.RepairSaturation,  # needs activation and weight parameters, and to know what is quantized at run time
    p.SelectLayers,  # and the repaired ones
)
REFINE: tuple[type[Pass], ...] = (
    p.RepairBiasScales,  # changes weight parameters
    p.RoundWeights,  # needs the final ones
    p.CorrectBias,  # of the layers that round-weights left
)
LOWER: tuple[type[Pass], ...] = (
    p.InsertDynamic,  # before the rest, which would round these layers' weights and biases another way
    p.InsertDynamicLstm,
    p.InsertWeightOnly,  # what the two above leave
    p.QuantizeBiases,  # while specs still tell whose scales a bias is derived from
    p.QuantizeWeights,
    p.GatherBeforeDequantize,
    p.InsertQdq,
    p.RemoveRedundantPairs,
    p.DeduplicateQdq,
    p.RemoveAbsorbedActivations,  # before insert-float-guards, which looks for the Q behind a float layer
    p.InsertSingleReads,
    p.InsertFloatGuards,  # last: it looks at the Q and DQ that are left
)

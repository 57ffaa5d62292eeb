"""Every graph rewrite: one pass a file, a folder a stage, in running order. Installed as onnxq.passes."""

if __name__ != "onnxq.passes":
    raise ImportError("import onnxq.passes, not passes: a second copy of every class would not be the same class")

from onnxq.passes.canonicalize.deduplicate_constants import DeduplicateConstants
from onnxq.passes.canonicalize.fold_constants import FoldConstants
from onnxq.passes.canonicalize.fold_shapes import FoldShapes
from onnxq.passes.canonicalize.infer_shapes import InferShapes
from onnxq.passes.canonicalize.learn_types import LearnTypes
from onnxq.passes.canonicalize.raise_opset import RaiseOpset
from onnxq.passes.canonicalize.remove_cast import RemoveCast
from onnxq.passes.canonicalize.remove_dropout import RemoveDropout
from onnxq.passes.canonicalize.remove_identity import RemoveIdentity
from onnxq.passes.canonicalize.remove_reshape_pairs import RemoveReshapePairs
from onnxq.passes.canonicalize.remove_transpose_pairs import RemoveTransposePairs
from onnxq.passes.equalize.equalize_gates import EqualizeGates
from onnxq.passes.equalize.equalize_layers import EqualizeLayers
from onnxq.passes.fuse.fold_batchnorm import FoldBatchnorm
from onnxq.passes.fuse.fold_div import FoldDiv
from onnxq.passes.fuse.fold_sub import FoldSub
from onnxq.passes.fuse.fuse_clip import FuseClip
from onnxq.passes.fuse.fuse_conv_affine import FuseConvAffine
from onnxq.passes.fuse.fuse_conv_batchnorm import FuseConvBatchnorm
from onnxq.passes.fuse.fuse_gelu import FuseGelu
from onnxq.passes.fuse.fuse_gemm_batchnorm import FuseGemmBatchnorm
from onnxq.passes.fuse.fuse_hardsigmoid import FuseHardsigmoid
from onnxq.passes.fuse.fuse_hardswish import FuseHardswish
from onnxq.passes.fuse.fuse_instancenorm import FuseInstancenorm
from onnxq.passes.fuse.fuse_layernorm import FuseLayernorm
from onnxq.passes.fuse.fuse_matmul_add import FuseMatmulAdd
from onnxq.passes.fuse.fuse_pad import FusePad
from onnxq.passes.fuse.fuse_reducemean import FuseReducemean
from onnxq.passes.fuse.fuse_rmsnorm import FuseRmsnorm
from onnxq.passes.fuse.fuse_rotary import FuseRotary
from onnxq.passes.fuse.fuse_sigmoid import FuseSigmoid
from onnxq.passes.fuse.fuse_softmax import FuseSoftmax
from onnxq.passes.lower.deduplicate_qdq import DeduplicateQdq
from onnxq.passes.lower.gather_before_dequantize import GatherBeforeDequantize
from onnxq.passes.lower.insert_dynamic import InsertDynamic
from onnxq.passes.lower.insert_dynamic_lstm import InsertDynamicLstm
from onnxq.passes.lower.insert_float_guards import InsertFloatGuards
from onnxq.passes.lower.insert_qdq import InsertQdq
from onnxq.passes.lower.insert_single_reads import InsertSingleReads
from onnxq.passes.lower.insert_weight_only import InsertWeightOnly
from onnxq.passes.lower.quantize_biases import QuantizeBiases
from onnxq.passes.lower.quantize_weights import QuantizeWeights
from onnxq.passes.lower.remove_absorbed_activations import RemoveAbsorbedActivations
from onnxq.passes.lower.remove_redundant_pairs import RemoveRedundantPairs
from onnxq.passes.observe.choose_ranges import ChooseRanges
from onnxq.passes.observe.choose_weight_ranges import ChooseWeightRanges
from onnxq.passes.observe.collect_statistics import CollectStatistics
from onnxq.passes.observe.share_concat_ranges import ShareConcatRanges
from onnxq.passes.place.annotate_attention import AnnotateAttention
from onnxq.passes.place.annotate_compute import AnnotateCompute
from onnxq.passes.place.annotate_dynamic import AnnotateDynamic
from onnxq.passes.place.annotate_embeddings import AnnotateEmbeddings
from onnxq.passes.place.annotate_regions import AnnotateRegions
from onnxq.passes.place.annotate_residuals import AnnotateResiduals
from onnxq.passes.recover.expand_dynamic import ExpandDynamic
from onnxq.passes.recover.expand_qoperators import ExpandQoperators
from onnxq.passes.recover.fold_weight_dequantize import FoldWeightDequantize
from onnxq.passes.recover.remove_fake_quantize import RemoveFakeQuantize
from onnxq.passes.recover.remove_quantize_pairs import RemoveQuantizePairs
from onnxq.passes.refine.correct_bias import CorrectBias
from onnxq.passes.refine.repair_bias_scales import RepairBiasScales
from onnxq.passes.refine.round_weights import RoundWeights
from onnxq.passes.select.repair_saturation import RepairSaturation
from onnxq.passes.select.select_dynamic import SelectDynamic
from onnxq.passes.select.select_layers import SelectLayers

PASSES = {
    p.name: p
    for p in (
        ExpandQoperators,
        ExpandDynamic,
        RemoveFakeQuantize,
        FoldWeightDequantize,
        RemoveQuantizePairs,
        RaiseOpset,
        FoldConstants,
        InferShapes,
        LearnTypes,
        FoldShapes,
        RemoveIdentity,
        RemoveDropout,
        RemoveCast,
        RemoveReshapePairs,
        RemoveTransposePairs,
        DeduplicateConstants,
        FuseClip,
        FuseHardsigmoid,
        FuseHardswish,
        FuseSigmoid,
        FuseGelu,
        FuseSoftmax,
        FuseInstancenorm,
        FuseLayernorm,
        FuseRmsnorm,
        FuseRotary,
        FuseConvBatchnorm,
        FuseGemmBatchnorm,
        FusePad,
        FuseMatmulAdd,
        FuseReducemean,
        FoldSub,
        FoldDiv,
        FuseConvAffine,
        FoldBatchnorm,
        EqualizeLayers,
        EqualizeGates,
        AnnotateCompute,
        AnnotateAttention,
        AnnotateRegions,
        AnnotateResiduals,
        AnnotateEmbeddings,
        AnnotateDynamic,
        CollectStatistics,
        ChooseRanges,
        ShareConcatRanges,
        ChooseWeightRanges,
        RepairSaturation,
        SelectDynamic,
        SelectLayers,
        RepairBiasScales,
        RoundWeights,
        CorrectBias,
        InsertDynamic,
        InsertDynamicLstm,
        InsertWeightOnly,
        QuantizeBiases,
        QuantizeWeights,
        GatherBeforeDequantize,
        InsertQdq,
        RemoveRedundantPairs,
        DeduplicateQdq,
        RemoveAbsorbedActivations,
        InsertSingleReads,
        InsertFloatGuards,
    )
}

"""Dropped tokens come back as cluster means, standing where their density-peak centres stood.
Shapes: N tokens, D width.
"""

from jaxtyping import Float, Int
from torch import Tensor

from effivlm.ops.cluster import dpc_knn
from effivlm.ops.merge import Triple, average


def cluster_means(
    x: Float[Tensor, "N D"], members: Int[Tensor, "m"], count: int
) -> tuple[Int[Tensor, "c"], Triple]:
    """Cluster ``members`` (indices into x) into ``count`` plain means; neighbours for
    densities: ``count``.

    Returns:
        (centres, indices into x by descending density times distance; the merge that writes
        the means there).
    """
    clusters = dpc_knn(x[members], count, count)
    centres = members[clusters.centres]
    return centres, average(centres[clusters.assign], members)

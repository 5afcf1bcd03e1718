"""Pictures: feature maps as colours, clusters, what a student answers, and the curves of runs.

`python -m capi.visualize {pca,clusters,masks,curves} ... --output FILE.png` draws them.
"""

from capi.visualize.curves import plot_curves
from capi.visualize.maps import feature_map
from capi.visualize.pca import draw_pca

__all__ = ["draw_pca", "feature_map", "plot_curves"]

"""The clustering methods: a new one is a row here and a function.

The function declares, by name, those of the arguments below that it reads, and gets no others.
It returns a `clustering.methods.InitialGroups`, which `group_classes` bounds and refines.

    statistics       PredictionStatistics of C classes; holds at least one example; who
                     reads its covariance is in READ_COVARIANCE
    confused         affinity of the classes, float32 csr_array [C, C], symmetric, zero
                     diagonal
    num_groups       G, from 1 to C
    overlap          the most groups that a class may be in, from 1 to G
    seed             int; the same seed gives the same groups
    classifier_rows  array or tensor [C, D], in a run the weights of the generalist's
                     head; the caller must give it to a method that declares it, and to no
                     other

This module imports nothing, so that a config can be read where numpy is not installed.
"""

METHODS: dict[str, str] = {  # name: "module:function"
    "kmeans": "clustering.methods:kmeans",
    "minibatch": "clustering.methods:minibatch",
    "correlation": "clustering.methods:correlation",
    "raw": "clustering.methods:raw",
    "agglomerative": "clustering.methods:agglomerative",
    "graph": "clustering.methods:graph",
    "classifier": "clustering.methods:classifier",
    "random": "clustering.methods:random",
}

# Those that choose all groups of a class themselves, so that a coverage cannot add to them.
CHOOSE_ALL_GROUPS: set[str] = {"random"}

# Those that read the covariance of the predictions: for them alone it is gathered exactly where
# there are more than a few thousand classes.
READ_COVARIANCE: set[str] = {"correlation", "raw"}

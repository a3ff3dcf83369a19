"""Finds the reductions over replicas in the graphs of updates."""

import inspect


def of(model):
    """How many numbers each reduction takes in the graphs of a model that was fitted.

    Returns:
        A list of those in the one graph, for one replica, and the number of those in
        functions that it calls, such as the bodies of loops.
    """
    updates = inspect.getclosurevars(model.train_function).nonlocals["updates"]
    (function,) = updates.graphs.values()
    (concrete,) = function._list_all_concrete_functions_for_serialization()
    operations = [op for op in concrete.graph.get_operations() if reduces(op.type)]
    devices = {op.device for op in operations}
    sizes = [
        operation.inputs[0].shape.num_elements()
        for operation in operations
        if operation.device == min(devices)
    ]
    library = concrete.graph.as_graph_def().library.function
    inside = sum(reduces(node.op) for called in library for node in called.node_def)
    return sorted(sizes), inside


def reduces(operation):
    return operation.startswith("Collective")

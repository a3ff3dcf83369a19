"""Finds the reductions over replicas in the graphs of updates."""

import inspect


def of(model):
    """The reductions in the graph of a model that was fitted.

    Returns:
        A list of the numbers of values that the reductions of one replica take, and the
        number of reductions in functions that the graph calls, such as loop bodies.
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

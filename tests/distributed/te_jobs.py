"""What launched processes do with the stand-in for Transformer Engine."""

from tests.distributed.kept import pretrain_and_keep


def train(command_lines: list[list[str]]) -> list[dict[str, str]]:
    """Runs through the command lines of tools/pretrain.py with Transformer Engine's layers.

    Returns:
        Of each run, the recipe under which each matrix of this process was called in training, by its name
        in the whole model: its text, or `none`.
    """
    from tests import te_standin

    te_standin.install()  # before anything imports Megatron-Core
    from megatron_codec.model.weights import global_name
    from megatron_codec.parallel import shut_down

    results = []
    for command_line in command_lines:
        models = pretrain_and_keep(command_line)
        recipes = {
            global_name(chunk, name): sorted(set(module.recipes))
            for chunk in models
            for name, module in chunk.named_modules()
            if isinstance(module, te_standin.Linear)
        }
        assert all(len(found) == 1 for found in recipes.values()), recipes
        results.append({name: found for name, [found] in recipes.items()})
    shut_down()
    return results

"""Which test file tests a module that has no test file of its name. `test_structure.py` checks it.

A test file of the module's own name (``training/losses.py``: ``training/test_losses.py``) is better.
"""

from __future__ import annotations

# test file -> the modules that it tests
TESTED_IN: dict[str, str] = {
    "annotation/test_old_forms.py": "annotation.export",
    "annotation/test_store.py": "annotation.figures annotation.vocabulary",
    "checkpoint/test_convert.py": """
        checkpoint.convert_files checkpoint.convert_tokenizer
        checkpoint.hf_config checkpoint.write_gguf checkpoint.write_huggingface
        checkpoint.write_safetensors cli.convert""",
    "checkpoint/test_gguf.py": "checkpoint.gguf_file",
    "checkpoint/test_load.py": "checkpoint.interface checkpoint.match",
    "checkpoint/test_nemo.py": """
        checkpoint.inflate checkpoint.nemo_config checkpoint.nemo_files checkpoint.nemo_torch_dist""",
    "checkpoint/test_nemo_adapter.py": "checkpoint.merge_adapter",
    "checkpoint/test_pull_hub.py": "checkpoint.hub cli.models",
    "checkpoint/test_write_quantized.py": "checkpoint.gguf_quantize",
    "checkpoint/test_trainer_folders.py": "checkpoint.safetensors checkpoint.write_nemo",
    "cli/test_chat.py": "cli.conversation",
    "cli/test_demo.py": "cli.lifeline",
    "cli/test_generate.py": "cli.batch",
    "cli/test_generate_samples.py": "cli.answering",
    "cli/test_main.py": "cli.commands cli.completion cli.console cli.options cli.problems",
    "cli/test_serve.py": "cli.engines",
    "client/test_http.py": "client.fake_server client.interface client.remote client.retry",
    "client/test_odd_answers.py": "client.thoughts",
    "cluster/test_card_job.py": "cli.megatron_gpt_eval",
    "cluster/test_plan.py": """
        cli.plan cluster.hardware cluster.known_models cluster.layout cluster.sizes""",
    "cluster/test_slurm.py": "cli.launch",
    "evaluation/test_bbh.py": "evaluation.tasks.exact",
    "evaluation/test_choices.py": "evaluation.tasks.numbers",
    "evaluation/test_compare_and_report.py": """
        evaluation.compare evaluation.published evaluation.report evaluation.result""",
    "evaluation/test_datafiles.py": "evaluation.data evaluation.registry",
    "evaluation/test_human.py": "cli.eval_human evaluation.human_results evaluation.settings",
    "evaluation/test_own.py": "evaluation.options",
    "evaluation/test_runner.py": "evaluation.conversation evaluation.failures",
    "evaluation/test_scoring.py": """
        cli.eval evaluation.task evaluation.tasks.alpaca_eval evaluation.tasks.arena_hard
        evaluation.tasks.code evaluation.tasks.mmlu evaluation.tasks.mt_bench evaluation.tasks.rules""",
    "grading/test_answers.py": "grading.score",
    "grading/test_instructions.py": "grading.language",
    "inference/test_adapters.py": """
        inference.native.adapters inference.torch_adapters""",
    "inference/test_engine.py": """
        inference.core inference.requests inference.runner inference.torch_runner model.kv_cache""",
    "inference/test_fake.py": "inference.fake_tokenizer",
    "inference/test_load.py": "inference.precision",
    "inference/test_native.py": """
        inference.native.build inference.native.library inference.native.model""",
    "inference/test_scheduler.py": "inference.blocks",
    "inference/test_vllm_load.py": """
        inference.sent_weights inference.vllm_engine inference.vllm_loader inference.vllm_sampling""",
    "model/test_adapters.py": "model.adapter_config model.adapter_files",
    "model/test_transformer.py": "model.attention model.config model.layers model.presets model.rotary",
    "redteam/test_aegis.py": "redteam.aegis_report",
    "redteam/test_attacks.py": "redteam.attack_report redteam.judges",
    "redteam/test_garak.py": """
        cli.redteam_garak redteam.garak_areas redteam.garak_process redteam.garak_report
        redteam.garak_scan redteam.settings""",
    "redteam/test_replay.py": "cli.redteam",
    "redteam/test_sessions.py": "cli.redteam_sessions redteam.session_report",
    "server/test_nemo_routes.py": "server.app server.context server.front_door server.nemo",
    "server/test_nemo_validation.py": "server.nemo_request server.settings",
    "server/test_openai_chat.py": "server.openai_api server.openai_choices server.openai_schemas",
    "server/test_openai_fields.py": "server.rows server.tokenizer_api",
    "server/test_reward.py": "inference.reward server.kserve",
    "server/test_tools.py": "server.openai_tools",
    "synth/test_endpoint.py": "client.engine",
    "synth/test_export.py": "synth.card synth.merge",
    "synth/test_files.py": "row_files",
    "synth/test_methods.py": "cli.synth",
    "synth/test_own.py": "synth.columns",
    "synth/test_parsing.py": "synth.list_marks",
    "synth/test_replies.py": "synth.graph synth.work",
    "synth/test_rounds.py": "cli.child_server",
    "synth/test_runner.py": """
        client.fake synth.accounting synth.execute synth.ledger synth.recipe synth.rows
        synth.writer""",
    "synth/test_balance.py": "synth.stages.balance",
    "synth/test_stages.py": """
        synth.judges synth.stage synth.stages.asking synth.stages.dialogue synth.stages.filtering
        synth.stages.genetic synth.stages.instructions synth.stages.judging synth.stages.own
        synth.stages.questions
        synth.stages.sources synth.stages.topic_following synth.stages.topics""",
    "cli/test_recipe_cost.py": "cli.recipe_check training.rehearsal",
    "test_model_card.py": "cli.card",
    "test_recipe.py": "cli.recipe",
    "test_doors.py": "engine inference.rollouts",
    "test_config.py": "errors",
    "text/test_chat_template.py": "text.template_worker",
    "text/test_answers.py": "text.messages",
    "text/test_json_tokenizer.py": "text.tokenizer text.tokenizer_files",
    "text/test_prompt.py": "text.formats",
    "text/test_tools.py": "text.structured_output",
    "training/test_chain.py": "training.checks training.output training.run_chain",
    "training/test_composing.py": "checkpoint.adapter_base",
    "training/test_corpus.py": "training.shuffling",
    "training/test_doctor.py": "cli.doctor training.reading",
    "training/test_engine.py": """
        training.kto training.objectives training.online training.packing training.preference_settings
        training.samples""",
    "training/test_formats.py": """
        training.encoding training.prompts training.rows training.stages.preference training.stages.reward
        training.stages.sft""",
    "training/test_loading.py": "checkpoint.dcp checkpoint.trained training.sharded",
    "training/test_parallel.py": "training.pipeline",
    "training/test_policy_gradient.py": """
        training.judged training.policy training.policy_trainer training.rollout_trainer
        training.rollouts training.sampler
        training.stages.policy_gradient""",
    "training/test_published_rows.py": "training.cache training.dataset",
    "training/test_recipe.py": "training.new_recipe training.preview training.synonyms",
    "training/test_run.py": """
        cli.train model.reward_head training.inputs training.model_card training.scorer
        training.stages.pretrain""",
    "training/test_remote_sampler.py": "checkpoint.derived server.rollouts training.rollout_settings",
    "training/test_results.py": "training.schedule",
    "training/test_rewards.py": "client.own_code",
    "training/test_losses.py": "training.advantages",
    "training/test_steerlm.py": "training.stages.steerlm",
    "training/test_tokenizing.py": "cli.data text.parallel_encoding",
    "training/test_trainer.py": "training.checkpoints",
}

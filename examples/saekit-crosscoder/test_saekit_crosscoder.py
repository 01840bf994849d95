"""Run it with `pytest`, where the plugin is installed."""

import saekit_crosscoder

from saekit.testing import check_plugin


def test_it_keeps_what_an_architecture_promises():
    configs = [saekit_crosscoder.CrosscoderConfig(), saekit_crosscoder.CrosscoderConfig(l1_warm_up_steps=5)]
    check_plugin(saekit_crosscoder, configs={"my_crosscoder": configs})

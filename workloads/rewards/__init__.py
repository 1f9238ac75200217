"""Rewards: functions, reward models and judges behind one `score`."""

"""Pipeline parallelism: schedules as data, a checker that proves them right, and a step of training as one list."""

"""Pipeline parallelism: schedules as data, a checker that refuses wrong ones before they run, and what runs them."""

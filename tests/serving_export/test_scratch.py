def test_world(world, caplog):
    print(world.exported)

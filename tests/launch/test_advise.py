def test_smoke(ward, referral):
    code, out, err = referral("advise", ward.write_config(), "--run", ward.run_path)
    print(out, err)
    assert code == 0
    print(ward.calls("end"))
    code, out, err = referral("status", ward.run_path)
    print(out, err)
    code, out, err = referral("advise", ward.run_path, "--scarce", "latency")
    print(out, err)
    code, out, err = referral("run", "--advised", "--run", ward.run_path)
    print(out, err)
    code, out, err = referral("status", ward.run_path)
    print(out, err)
    code, out, err = referral("run", "--advised", "--run", ward.run_path)
    print(out, err)
    code, out, err = referral("advise", ward.run_path, "--scarce", "training")
    print(out, err)
    assert 0

// Checks this artefact: runs the golden images by ONNX Runtime and compares with what PyTorch said of them.
//
//     g++ -std=c++17 -O2 selftest.cpp -I ORT/include -L ORT/lib -lonnxruntime -o /tmp/selftest
//     /tmp/selftest FOLDER        # the artefact's; ORT is an unpacked release of ONNX Runtime, 1.16 or later
//
// Prints a line per output and PASS or FAIL; exit code 0, or 1 where it fails.

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

// An output of the network: its file in golden/, what an error on each image is divided by, the largest rel.
struct Golden {
  const char* name;
  const char* file;
  std::vector<double> spreads;
  double limit;
};

// <facts>
const char* const kModel = "model.onnx";
const char* const kInput = "image";
const std::int64_t kBatch = 1;
const std::vector<float> kMean = {0.5, 0.5, 0.5};
const std::vector<float> kStd = {0.5, 0.5, 0.5};
const std::vector<Golden> kGolden = {{"logits", "logits.npy", {1.0}, 1e-4}};
// </facts>

template <typename T>
struct Array {
  std::vector<std::int64_t> shape;
  std::vector<T> values;
  std::size_t per_image() const { return values.size() / static_cast<std::size_t>(shape[0]); }
};

// A C-contiguous little-endian .npy file: magic, version, length of the header, header (a Python dict), values.
template <typename T>
Array<T> load(const std::filesystem::path& path, const std::string& dtype) {
  std::ifstream file(path, std::ios::binary);
  const std::string bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  const auto byte = [&](std::size_t at) { return static_cast<std::size_t>(static_cast<unsigned char>(bytes[at])); };
  if (bytes.size() < 12 || bytes.compare(0, 6, "\x93NUMPY") != 0) {
    throw std::runtime_error(path.string() + " is no .npy file");
  }
  const bool first = byte(6) == 1;
  const std::size_t start = first ? 10 : 12;
  std::size_t length = byte(8) | byte(9) << 8;
  if (!first) length |= byte(10) << 16 | byte(11) << 24;
  if (start + length > bytes.size()) throw std::runtime_error(path.string() + " is cut short");
  const std::string header = bytes.substr(start, length);
  const std::size_t shape = header.find("'shape': (");
  if (header.find("'" + dtype + "'") == std::string::npos || shape == std::string::npos ||
      header.find("'fortran_order': False") == std::string::npos) {
    throw std::runtime_error(path.string() + " does not hold " + dtype + " in C order");
  }
  Array<T> array;
  std::size_t count = 1;
  const char* at = header.c_str() + shape + 10;
  while (*at != ')' && *at != '\0') {
    char* end = nullptr;
    const long long axis = std::strtoll(at, &end, 10);
    if (end == at) {
      ++at;  // a comma or a blank
      continue;
    }
    array.shape.push_back(axis);
    count *= static_cast<std::size_t>(axis);
    at = end;
  }
  if (array.shape.empty() || count == 0 || bytes.size() - start - length != count * sizeof(T)) {
    throw std::runtime_error(path.string() + " is cut short");
  }
  array.values.resize(count);
  std::memcpy(array.values.data(), bytes.data() + start + length, count * sizeof(T));
  return array;
}

// (n, H, W, C) pixels -> (n, C, H, W), every operation in float32.
std::vector<float> normalised(const Array<std::uint8_t>& images) {
  const std::size_t channels = static_cast<std::size_t>(images.shape[3]);
  const std::size_t pixels = static_cast<std::size_t>(images.shape[1] * images.shape[2]);
  std::vector<float> result(images.values.size());
  for (std::size_t image = 0; image < static_cast<std::size_t>(images.shape[0]); ++image) {
    for (std::size_t pixel = 0; pixel < pixels; ++pixel) {
      for (std::size_t channel = 0; channel < channels; ++channel) {
        const float scaled = static_cast<float>(images.values[(image * pixels + pixel) * channels + channel]) / 255.0f;
        result[(image * channels + channel) * pixels + pixel] = (scaled - kMean[channel]) / kStd[channel];
      }
    }
  }
  return result;
}

// The golden outputs of all images, one after the other; a batch that is not full is filled up with its last image.
std::vector<std::vector<float>> run(const std::filesystem::path& model, const Array<std::uint8_t>& images) {
  Ort::Env env(ORT_LOGGING_LEVEL_ERROR, "selftest");
  Ort::Session session(env, model.c_str(), Ort::SessionOptions{});
  std::vector<const char*> names;
  for (const Golden& golden : kGolden) names.push_back(golden.name);

  const std::vector<float> inputs = normalised(images);
  const std::size_t count = static_cast<std::size_t>(images.shape[0]), each = images.per_image();
  const std::size_t batch = kBatch > 0 ? static_cast<std::size_t>(kBatch) : count;
  const std::vector<std::int64_t> shape = {static_cast<std::int64_t>(batch), images.shape[3], images.shape[1],
                                           images.shape[2]};
  const Ort::MemoryInfo memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  std::vector<std::vector<float>> found(kGolden.size());
  for (std::size_t start = 0; start < count; start += batch) {
    std::vector<float> filled;
    for (std::size_t index = 0; index < batch; ++index) {
      const std::size_t image = std::min(start + index, count - 1);
      filled.insert(filled.end(), inputs.begin() + image * each, inputs.begin() + (image + 1) * each);
    }
    const Ort::Value input =
        Ort::Value::CreateTensor<float>(memory, filled.data(), filled.size(), shape.data(), shape.size());
    const std::vector<Ort::Value> outputs =
        session.Run(Ort::RunOptions{nullptr}, &kInput, &input, 1, names.data(), names.size());
    for (std::size_t output = 0; output < outputs.size(); ++output) {
      const std::size_t values = outputs[output].GetTensorTypeAndShapeInfo().GetElementCount() / batch;
      const float* data = outputs[output].GetTensorData<float>();
      found[output].insert(found[output].end(), data, data + values * std::min(batch, count - start));
    }
  }
  return found;
}

bool check(const std::filesystem::path& folder) {
  const Array<std::uint8_t> images = load<std::uint8_t>(folder / "golden" / "images.npy", "|u1");
  if (images.shape.size() != 4 || static_cast<std::size_t>(images.shape[3]) != kMean.size()) {
    throw std::runtime_error("the golden images are not (n, H, W, C)");
  }
  const std::vector<std::vector<float>> found = run(folder / kModel, images);
  std::size_t judged = 0;
  bool right = true;
  for (std::size_t output = 0; output < kGolden.size(); ++output) {
    const Golden& golden = kGolden[output];
    const Array<float> expected = load<float>(folder / "golden" / golden.file, "<f4");
    if (found[output].size() != expected.values.size() ||
        static_cast<std::size_t>(expected.shape[0]) != golden.spreads.size()) {
      std::printf("%s: %zu values, golden %zu\n", golden.name, found[output].size(), expected.values.size());
      right = false;
      continue;
    }
    if (*std::min_element(golden.spreads.begin(), golden.spreads.end()) <= 0) {
      std::printf("%s: the same for every golden image, not judged\n", golden.name);
      continue;
    }
    double rel = 0;
    for (std::size_t index = 0; index < expected.values.size(); ++index) {
      const double error = std::abs(static_cast<double>(found[output][index]) - expected.values[index]);
      const double share = error / golden.spreads[index / expected.per_image()];
      if (!(share <= rel)) rel = share;  // NaN too
      if (std::isnan(rel)) break;
    }
    std::printf("%s: rel %.2e, limit %.0e\n", golden.name, rel, golden.limit);
    right = right && rel <= golden.limit;
    ++judged;
  }
  return right && judged > 0;
}

}  // namespace

int main(int argc, char** argv) {
  bool right = false;
  try {
    right = check(argc > 1 ? std::filesystem::path(argv[1]) : std::filesystem::current_path().parent_path());
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
  }
  std::printf(right ? "PASS\n" : "FAIL\n");
  return right ? 0 : 1;
}

// Runs a .pte file on one thread: `runner MODEL.pte`. Talks to its caller as guest.py says: first the text that the
// file's method "metadata" returns, in one line; then tensors on stdin, answered by tensors on stdout.
// `runner --check` only shows that the program and its libraries load.

#include <cstdio>
#include <cstring>
#include <iostream>
#include <sstream>
#include <string>
#include <unistd.h>
#include <vector>

#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>
#include <executorch/extension/threadpool/threadpool_guard.h>

using executorch::aten::ScalarType;
using executorch::aten::SizesType;
using executorch::extension::Module;
using executorch::runtime::Error;
using executorch::runtime::EValue;

struct Kind {
  ScalarType type;
  const char* name;  // numpy's
  size_t size;       // bytes
};

constexpr Kind KINDS[] = {
    {ScalarType::Float, "float32", 4}, {ScalarType::Half, "float16", 2}, {ScalarType::Double, "float64", 8},
    {ScalarType::Byte, "uint8", 1},    {ScalarType::Char, "int8", 1},    {ScalarType::Short, "int16", 2},
    {ScalarType::Int, "int32", 4},     {ScalarType::Long, "int64", 8},   {ScalarType::Bool, "bool", 1},
};

[[noreturn]] void fail(const std::string& what) {
  std::cerr << what << std::endl;
  _exit(1);
}

void require(Error error, const char* what) {
  if (error != Error::Ok) fail(std::string(what) + ": " + executorch::runtime::to_string(error));
}

const Kind& kind_of(ScalarType type) {
  for (const Kind& kind : KINDS)
    if (kind.type == type) return kind;
  fail("the type of a tensor is not known to the runner");
}

const Kind& kind_named(const std::string& name) {
  for (const Kind& kind : KINDS)
    if (name == kind.name) return kind;
  fail("tensors of " + name + " are not known to the runner");
}

// The next tensor of stdin into `bytes`, which has to outlive it. False at the end.
bool read_tensor(std::vector<char>& bytes, executorch::extension::TensorPtr& tensor) {
  std::string line, name;
  if (!std::getline(std::cin, line)) return false;
  std::istringstream words(line);
  words >> name;
  const Kind& kind = kind_named(name);
  std::vector<SizesType> sizes;
  size_t count = kind.size;
  for (SizesType size; words >> size;) {
    sizes.push_back(size);
    count *= size;
  }
  bytes.resize(count);
  if (!std::cin.read(bytes.data(), count)) return false;
  tensor = executorch::extension::from_blob(bytes.data(), sizes, kind.type);
  return true;
}

void write_tensor(const executorch::aten::Tensor& tensor, FILE* out) {
  const Kind& kind = kind_of(tensor.scalar_type());
  std::string line = kind.name;
  for (SizesType size : tensor.sizes()) line += " " + std::to_string(size);
  line += "\n";
  fwrite(line.data(), 1, line.size(), out);
  fwrite(tensor.const_data_ptr(), 1, tensor.nbytes(), out);
}

int main(int count, char** arguments) {
  if (count != 2) fail("usage: runner MODEL.pte");
  if (!std::strcmp(arguments[1], "--check")) return 0;
  std::ios::sync_with_stdio(false);
  FILE* out = fdopen(dup(1), "wb");
  dup2(2, 1);  // what the runtime prints must not stand between the tensors

  // One thread: the order of sums does not depend on the machine.
  executorch::extension::threadpool::NoThreadPoolGuard guard;
  Module module(arguments[1], Module::LoadMode::Mmap);
  require(module.load(executorch::runtime::Program::Verification::InternalConsistency), "the file does not load");
  auto metadata = module.get("metadata");
  require(metadata.error(), "the file tells no names");
  const std::string names(metadata->toString());
  fprintf(out, "%s\n", names.c_str());
  fflush(out);
  auto method = module.method_meta("forward");
  require(method.error(), "the file has no method 'forward'");

  const size_t arity = method->num_inputs();
  std::vector<std::vector<char>> bytes(arity);
  std::vector<executorch::extension::TensorPtr> tensors(arity);
  for (;;) {
    std::vector<EValue> inputs;
    for (size_t index = 0; index < arity; ++index) {
      if (!read_tensor(bytes[index], tensors[index])) return 0;
      inputs.emplace_back(tensors[index]);
    }
    auto outputs = module.execute("forward", inputs);
    require(outputs.error(), "forward failed");
    for (const EValue& output : *outputs) write_tensor(output.toTensor(), out);
    fflush(out);
  }
}
